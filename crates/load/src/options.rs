//! What `saga load` can be told, and what of it is refused.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};

use crate::target::Target;

/// Buyers, and with them connections, in all.
const MAX_BUYERS: u64 = 100_000;
/// Customers that are signed up at most, each with a password that the shop has to hash.
const MAX_CUSTOMERS: u64 = 100_000;
/// Products that are created at most.
const MAX_PRODUCTS: u64 = 1_000_000;
/// Lines of a cart at most.
const MAX_CART_LINES: u64 = 1_000;
/// The largest stock and the largest price: what a JSON number carries through JavaScript.
const MAX_NUMBER: u64 = (1 << 53) - 1;
/// The longest run and the longest time-out.
const MAX_DURATION: Duration = Duration::from_secs(7 * 24 * 60 * 60);
/// The highest rate: one request in a microsecond.
const MAX_RATE: f64 = 1e6;
/// How many idle streams share a customer, unless told otherwise. A shop allows a customer 32.
const STREAMS_PER_CUSTOMER: u64 = 16;

/// What is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Scenario {
    /// POST /api/purchase, followed to its end
    Purchase,
    /// GET /api/product/{id}, spread over the products
    Product,
    /// GET /api/products?offset=0&size=100
    Catalogue,
}

/// What a buyer waits for before the next purchase.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Until {
    /// The answer
    Accepted,
    /// The end of the purchase
    Completed,
}

/// How the ends of purchases are learned.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Completion {
    /// From the customers' event streams, and by asking where an event is missing
    Events,
    /// Not at all: only the answers are measured
    None,
}

/// Arguments of `saga load`.
#[derive(Clone, Debug, Args)]
pub struct Options {
    /// The shop under load
    #[arg(value_name = "URL", default_value = "http://127.0.0.1:8080")]
    pub url: Target,
    /// What is sent
    #[arg(long, value_enum, default_value_t = Scenario::Purchase)]
    pub scenario: Scenario,
    /// How long is measured (30s, 500ms, 10m)
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = duration)]
    pub duration: Duration,
    /// How long the load runs before it is measured
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = duration)]
    pub warm_up: Duration,
    /// How long purchases may take to end after the last one was sent
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = duration)]
    pub drain: Duration,
    /// Open loop: so many requests a second in all, each measured from the time it was due
    #[arg(long, value_name = "PER SECOND", value_parser = rate)]
    pub rate: Option<f64>,
    /// Buyers; each has one connection and one request under way at a time
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=MAX_BUYERS as i64))]
    pub buyers: u32,
    /// What a buyer waits for before the next purchase
    #[arg(long, value_enum, default_value_t = Until::Accepted, conflicts_with = "rate")]
    pub until: Until,
    /// Customers that the buyers buy for, each with one event stream [default: as many as buyers]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=MAX_CUSTOMERS as i64))]
    pub customers: Option<u32>,
    /// Further event streams that are held open and read
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u32).range(0..=MAX_BUYERS as i64))]
    pub streams: u32,
    /// Customers who do not buy, for those further streams [default: one for 16 streams]
    #[arg(long, value_name = "N", conflicts_with = "streams_follow", value_parser = clap::value_parser!(u32).range(1..=MAX_CUSTOMERS as i64))]
    pub stream_customers: Option<u32>,
    /// The further streams belong to the customers who buy
    #[arg(long)]
    pub streams_follow: bool,
    /// How the ends of purchases are learned
    #[arg(long, value_enum, default_value_t = Completion::Events)]
    pub completion: Completion,
    /// An accepted purchase without its last event for so long is asked for
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = duration)]
    pub event_timeout: Duration,
    /// Products that are created and bought
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=MAX_PRODUCTS as i64))]
    pub products: u32,
    /// What there is of each product
    #[arg(long, value_name = "N", default_value_t = 1_000_000_000, value_parser = clap::value_parser!(u64).range(0..=MAX_NUMBER))]
    pub stock: u64,
    /// Different products in a cart
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=MAX_CART_LINES as i64))]
    pub cart_size: u32,
    /// How many of each product are in a cart
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    pub amount: u32,
    /// Share of carts, 0 to 1, with a product of which there is none
    #[arg(long, value_name = "SHARE", default_value_t = 0.0, value_parser = share)]
    pub out_of_stock: f64,
    /// Share of carts, 0 to 1, that cost more than may be paid
    #[arg(long, value_name = "SHARE", default_value_t = 0.0, value_parser = share)]
    pub declined: f64,
    /// The price of a product that makes a cart be declined
    #[arg(long, value_name = "PRICE", default_value_t = 1_000_001, value_parser = clap::value_parser!(u64).range(1..=MAX_NUMBER))]
    pub declined_price: u64,
    /// The same seed draws the same carts
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub seed: u64,
    /// Give every purchase an Idempotency-Key, and send what got no answer, 429 or 503 again until it is answered
    #[arg(long)]
    pub retry: bool,
    /// In the end, check over the API that stock, orders and payments add up
    #[arg(long)]
    pub verify: bool,
    /// Check the order and the payment of every purchase, not of an even sample of 100,000
    #[arg(long, requires = "verify")]
    pub verify_all: bool,
    /// How long a request may take
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = duration)]
    pub request_timeout: Duration,
    /// Threads that make the load [default: half of the cores]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub threads: Option<u32>,
    /// The token that creating products needs
    #[arg(long, value_name = "TOKEN", env = "SAGA_CATALOG__ADMIN_TOKEN", hide_env_values = true)]
    pub admin_token: Option<String>,
    /// Print the result as one JSON object
    #[arg(long)]
    pub json: bool,
    /// Write one line of JSON a second to this file
    #[arg(long, value_name = "FILE")]
    pub series: Option<PathBuf>,
    /// Do not tell how it goes
    #[arg(long)]
    pub quiet: bool,
}

/// Options that are each allowed, but not together.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Conflict {
    /// Products in a cart differ.
    #[error("--cart-size {lines} needs at least as many products, and --products is {products}")]
    CartTooLarge {
        /// Lines of a cart.
        lines: u32,
        /// Products that there are.
        products: u32,
    },
    /// Carts are of one kind.
    #[error("--out-of-stock {out_of_stock} and --declined {declined} are more than 1 together")]
    Shares {
        /// Share of carts with a product of which there is none.
        out_of_stock: f64,
        /// Share of carts that cost too much.
        declined: f64,
    },
    /// What ended is not known.
    #[error("--verify needs to know how purchases ended: not with --completion none")]
    VerifyBlind,
    /// Nobody would wake the buyer.
    #[error("--until completed needs to know when purchases end: not with --completion none")]
    UntilBlind,
    /// Reading buys nothing.
    #[error("{option} is about purchases: not with another --scenario")]
    OnlyPurchases {
        /// The option.
        option: &'static str,
    },
    /// Nothing would be measured.
    #[error("--duration 0: there is nothing to measure")]
    NoDuration,
    /// No request could be answered in time.
    #[error("{option} 0: nothing can be that fast")]
    NoTime {
        /// The option.
        option: &'static str,
    },
}

impl Options {
    /// What is told and does not fit together.
    ///
    /// # Errors
    /// [`Conflict`], the first one.
    pub fn check(&self) -> Result<(), Conflict> {
        let purchases = self.scenario == Scenario::Purchase;
        let blind = self.completion == Completion::None;
        let (lines, products) = (self.cart_size, self.products);
        let (out_of_stock, declined) = (self.out_of_stock, self.declined);
        let only = |option| Conflict::OnlyPurchases { option };
        let checks = [
            (lines > products, Conflict::CartTooLarge { lines, products }),
            (out_of_stock + declined > 1.0, Conflict::Shares { out_of_stock, declined }),
            (!purchases && self.verify, only("--verify")),
            (!purchases && self.retry, only("--retry")),
            (!purchases && self.streams > 0, only("--streams")),
            (!purchases && self.until == Until::Completed, only("--until completed")),
            (blind && self.verify, Conflict::VerifyBlind),
            (blind && self.until == Until::Completed, Conflict::UntilBlind),
            (self.duration.is_zero(), Conflict::NoDuration),
            (self.request_timeout.is_zero(), Conflict::NoTime { option: "--request-timeout" }),
            (self.event_timeout.is_zero(), Conflict::NoTime { option: "--event-timeout" }),
        ];
        checks.into_iter().find_map(|(holds, conflict)| holds.then_some(Err(conflict))).unwrap_or(Ok(()))
    }

    /// Customers who buy. None in a scenario that needs no token.
    pub(crate) fn buying_customers(&self) -> u32 {
        match self.scenario {
            Scenario::Purchase => self.customers.unwrap_or(self.buyers).min(self.buyers),
            Scenario::Product | Scenario::Catalogue => 0,
        }
    }

    /// Customers who only listen.
    pub(crate) fn listening_customers(&self) -> u32 {
        if self.streams == 0 || self.streams_follow {
            return 0;
        }
        let enough = u64::from(self.streams).div_ceil(STREAMS_PER_CUSTOMER) as u32;
        self.stream_customers.unwrap_or(enough).min(self.streams)
    }

    /// Threads that make the load. A customer's buyers and streams are on one thread.
    pub(crate) fn threads(&self) -> u32 {
        let cores = std::thread::available_parallelism().map_or(1, usize::from) as u32;
        let most = if self.scenario == Scenario::Purchase { self.buying_customers() } else { self.buyers };
        self.threads.unwrap_or(cores / 2).clamp(1, most.max(1))
    }

    /// Whether event streams are opened and purchases are followed to their ends.
    pub(crate) fn follows(&self) -> bool {
        self.scenario == Scenario::Purchase && self.completion == Completion::Events
    }
}

/// A time as it is written: a whole number and a unit.
fn duration(text: &str) -> Result<Duration, String> {
    let expected = || format!("a whole number and one of ms, s, m, h expected, at most {MAX_DURATION:?}");
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| expected())?;
    let millis = match unit {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        _ => return Err(expected()),
    };
    let duration = number.checked_mul(millis).map(Duration::from_millis);
    duration.filter(|duration| *duration <= MAX_DURATION).ok_or_else(expected)
}

fn share(text: &str) -> Result<f64, String> {
    let share = text.parse().ok().filter(|share| (0.0..=1.0).contains(share));
    share.ok_or_else(|| "a number from 0 to 1 expected".to_owned())
}

fn rate(text: &str) -> Result<f64, String> {
    let rate = text.parse().ok().filter(|rate| *rate > 0.0 && *rate <= MAX_RATE);
    rate.ok_or_else(|| format!("a number above 0 expected, at most {MAX_RATE}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        options: Options,
    }

    fn parse(line: &str) -> Result<Options, String> {
        let parsed = Line::try_parse_from(["load"].into_iter().chain(line.split_whitespace()));
        parsed.map(|line| line.options).map_err(|error| error.to_string())
    }

    #[test]
    fn times_have_units() {
        for (text, millis) in
            [("0s", 0), ("500ms", 500), ("30s", 30_000), ("10m", 600_000), ("1h", 3_600_000)]
        {
            assert_eq!(duration(text), Ok(Duration::from_millis(millis)), "{text}");
        }
        for text in
            ["", "5", "s", "-1s", "1.5s", "1d", "99999999999999999999s", "169h", "18446744073709551615h"]
        {
            assert!(duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_bad_value_is_named() {
        for (line, named) in [
            ("--buyers 0", "0"),
            ("--rate 0", "0"),
            ("--rate NaN", "NaN"),
            ("--out-of-stock 1.5", "1.5"),
            ("--declined -1", "-1"),
            ("--duration soon", "soon"),
            ("https://shop.example", "https://shop.example"),
            ("--rate 5 --until completed", "--until"),
            ("--verify-all", "--verify"),
        ] {
            let error = parse(line).expect_err(line);
            assert!(error.contains(named), "{line}: {error}");
        }
    }

    #[test]
    fn what_does_not_fit_together_is_refused() {
        for (line, named) in [
            ("--cart-size 3 --products 2", "--cart-size 3"),
            ("--out-of-stock 0.6 --declined 0.6", "0.6"),
            ("--completion none --verify", "--verify"),
            ("--completion none --until completed", "--until"),
            ("--scenario product --verify", "--verify"),
            ("--scenario catalogue --streams 1", "--streams"),
            ("--duration 0s", "--duration"),
            ("--request-timeout 0s", "--request-timeout"),
        ] {
            let error = parse(line).expect(line).check().expect_err(line).to_string();
            assert!(error.contains(named), "{line}: {error}");
        }
    }

    #[test]
    fn customers_follow_from_buyers() {
        let options = parse("--buyers 8").expect("valid");
        assert_eq!((options.buying_customers(), options.listening_customers()), (8, 0));
        let options = parse("--buyers 8 --customers 3 --streams 33 --threads 9").expect("valid");
        assert_eq!((options.buying_customers(), options.listening_customers()), (3, 3));
        assert_eq!(options.threads(), 3, "a customer is on one thread");
        let options = parse("--scenario product --buyers 8 --threads 9").expect("valid");
        assert_eq!((options.buying_customers(), options.threads()), (0, 8));
    }
}
