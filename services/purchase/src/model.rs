//! The rules of a purchase, without I/O: which carts are accepted, what they cost, how a saga's end is named.

use std::collections::BTreeMap;

use saga::{End, Path, Reason, Status};
use serve::error::ApiError;
use serve::extract::MAX_ID;
use shop::purchase::{Purchase, PurchasedItem};

/// The largest total, price times amount summed over a cart: what a JSON number carries through JavaScript.
pub(crate) const MAX_TOTAL: i64 = (1 << 53) - 1;

/// Where a purchase is, as the HTTP API names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum State {
    /// On its way. (While it is being rolled back, the API says ROLLING_BACK: that is read from its path.)
    Open,
    /// Every step is done.
    Succeeded,
    /// A step said no; what was done before is undone.
    Failed,
    /// Its deadline passed before it was paid; what was done before is undone.
    Cancelled,
    /// It was tried as often as is allowed and has not ended. An operator may retry it.
    NeedsOperator,
}

impl State {
    /// The state in the database.
    pub(crate) fn number(self) -> u8 {
        match self {
            State::Open => 0,
            State::Succeeded => 1,
            State::Failed => 2,
            State::Cancelled => 3,
            State::NeedsOperator => 4,
        }
    }

    /// The state of a number from the database.
    pub(crate) fn from_number(number: u8) -> Option<State> {
        [State::Open, State::Succeeded, State::Failed, State::Cancelled, State::NeedsOperator]
            .into_iter()
            .find(|state| state.number() == number)
    }

    /// The name in the HTTP API.
    pub(crate) fn name(self, rolling_back: bool) -> &'static str {
        match self {
            State::Open if rolling_back => "ROLLING_BACK",
            State::Open => "PENDING",
            State::Succeeded => "SUCCEEDED",
            State::Failed => "FAILED",
            State::Cancelled => "CANCELLED",
            State::NeedsOperator => "NEEDS_OPERATOR",
        }
    }
}

/// The state and the reason that an ended saga leaves its purchase with.
pub(crate) fn ended(end: End, path: &Path) -> (State, Option<String>) {
    match (end, path.rejection()) {
        (End::Committed, _) => (State::Succeeded, None),
        (End::Aborted, Some(Reason::Cancelled)) => (State::Cancelled, Some("the deadline passed".to_owned())),
        (End::Aborted, Some(Reason::Refused(why))) => (State::Failed, Some(why.clone())),
        (End::Aborted, None) => (State::Failed, None),
    }
}

/// A status, as the HTTP API names it.
pub(crate) fn status_name(status: Status) -> &'static str {
    match status {
        Status::Execute => "STATUS_EXECUTE",
        Status::Success => "STATUS_SUCCESS",
        Status::Failed => "STATUS_FAILED",
        Status::RolledBack => "STATUS_ROLLBACKED",
    }
}

/// What a customer wants: each product once, sorted by id, with a positive amount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Cart {
    lines: BTreeMap<u64, i64>,
    currency_code: String,
}

impl Cart {
    /// Checks a cart as it was sent. A product that is named twice counts as the sum.
    pub(crate) fn new(
        items: impl IntoIterator<Item = (u64, i64)>,
        currency_code: String,
        max_lines: usize,
    ) -> Result<Cart, ApiError> {
        let mut lines: BTreeMap<u64, i64> = BTreeMap::new();
        for (product_id, amount) in items {
            if product_id > MAX_ID {
                let problem = format!("{product_id}, 0 to {MAX_ID} expected");
                return Err(ApiError::invalid_parameter("product_id", problem));
            }
            if !(1..=MAX_TOTAL).contains(&amount) {
                let problem = format!("{amount} of product {product_id}, 1 to {MAX_TOTAL} expected");
                return Err(ApiError::invalid_parameter("amount", problem));
            }
            let sum = lines.entry(product_id).or_default();
            *sum = sum.checked_add(amount).filter(|sum| *sum <= MAX_TOTAL).ok_or_else(|| {
                let problem = format!("product {product_id} is named with more than {MAX_TOTAL} in all");
                ApiError::invalid_parameter("amount", problem)
            })?;
        }
        match lines.len() {
            0 => Err(ApiError::invalid_parameter("purchase_items", "empty, at least one expected")),
            n if n > max_lines => {
                let problem = format!("{n} products, at most {max_lines} expected");
                Err(ApiError::invalid_parameter("purchase_items", problem))
            }
            _ if !is_currency(&currency_code) => {
                let echo: String = currency_code.chars().take(16).collect();
                let problem = format!("{echo:?}, NT, US or an ISO 4217 code expected");
                Err(ApiError::invalid_parameter("currency_code", problem))
            }
            _ => Ok(Cart { lines, currency_code }),
        }
    }

    /// The products in it, sorted.
    pub(crate) fn product_ids(&self) -> Vec<u64> {
        self.lines.keys().copied().collect()
    }

    /// What the cart says, in bytes that are equal exactly for equal carts.
    pub(crate) fn canonical(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(16 * self.lines.len() + self.currency_code.len());
        for (product_id, amount) in &self.lines {
            bytes.extend(product_id.to_be_bytes());
            bytes.extend(amount.to_be_bytes());
        }
        bytes.extend(self.currency_code.as_bytes());
        bytes
    }

    /// The purchase at these prices, given in the order of [`Cart::product_ids`].
    pub(crate) fn priced(self, customer_id: u64, prices: &[Option<i64>]) -> Result<Purchase, ApiError> {
        let mut items = Vec::with_capacity(self.lines.len());
        let mut total: i64 = 0;
        for ((product_id, amount), price) in self.lines.into_iter().zip(prices) {
            let price = price.ok_or_else(|| ApiError::not_found("product not found"))?;
            total = price
                .checked_mul(amount)
                .and_then(|sum| sum.checked_add(total))
                .filter(|total| (0..=MAX_TOTAL).contains(total))
                .ok_or_else(|| {
                    let problem = format!("{amount} of product {product_id} at {price} each");
                    ApiError::invalid_parameter("purchase_items", format!("the total overflows: {problem}"))
                })?;
            items.push(PurchasedItem { product_id, amount, price });
        }
        Ok(Purchase { customer_id, items, currency_code: self.currency_code, total })
    }
}

/// `NT` and `US`, as the original has them, and the codes of ISO 4217 (those in use and those for funds and metals).
fn is_currency(code: &str) -> bool {
    const CODES: &str = "NT US \
        AED AFN ALL AMD ANG AOA ARS AUD AWG AZN BAM BBD BDT BGN BHD BIF BMD BND BOB BOV BRL BSD BTN BWP BYN BZD \
        CAD CDF CHE CHF CHW CLF CLP CNY COP COU CRC CUP CVE CZK DJF DKK DOP DZD EGP ERN ETB EUR FJD FKP GBP GEL \
        GHS GIP GMD GNF GTQ GYD HKD HNL HTG HUF IDR ILS INR IQD IRR ISK JMD JOD JPY KES KGS KHR KMF KPW KRW KWD \
        KYD KZT LAK LBP LKR LRD LSL LYD MAD MDL MGA MKD MMK MNT MOP MRU MUR MVR MWK MXN MXV MYR MZN NAD NGN NIO \
        NOK NPR NZD OMR PAB PEN PGK PHP PKR PLN PYG QAR RON RSD RUB RWF SAR SBD SCR SDG SEK SGD SHP SLE SOS SRD \
        SSP STN SVC SYP SZL THB TJS TMT TND TOP TRY TTD TWD TZS UAH UGX USD USN UYI UYU UYW UZS VED VES VND VUV \
        WST XAF XAG XAU XBA XBB XBC XBD XCD XCG XDR XOF XPD XPF XPT XSU XTS XUA XXX YER ZAR ZMW ZWG";
    (2..=3).contains(&code.len()) && CODES.split_ascii_whitespace().any(|known| known == code)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cart(items: &[(u64, i64)]) -> Result<Cart, ApiError> {
        Cart::new(items.iter().copied(), "EUR".to_owned(), 3)
    }

    fn refusal<T: std::fmt::Debug>(result: Result<T, ApiError>) -> String {
        result.unwrap_err().msg().to_owned()
    }

    #[test]
    fn a_product_named_twice_counts_as_the_sum() {
        let twice = cart(&[(7, 1), (3, 2), (7, 4)]).unwrap();
        assert_eq!(twice.product_ids(), [3, 7]);
        assert_eq!(twice.canonical(), cart(&[(7, 5), (3, 2)]).unwrap().canonical());
        let purchase = twice.priced(1, &[Some(10), Some(100)]).unwrap();
        assert_eq!(purchase.total, 520);
        assert_eq!(purchase.items[1], PurchasedItem { product_id: 7, amount: 5, price: 100 });
    }

    #[test]
    fn carts_that_make_no_sense_are_refused_with_the_value() {
        assert!(refusal(cart(&[])).contains("purchase_items: empty"));
        assert!(refusal(cart(&[(1, 0)])).contains("amount: 0 of product 1"));
        assert!(refusal(cart(&[(1, -4)])).contains("amount: -4 of product 1"));
        assert!(refusal(cart(&[(MAX_ID + 1, 1)])).contains("product_id: 9007199254740992, 0 to"));
        assert!(refusal(cart(&[(u64::MAX, 1)])).contains("product_id: 18446744073709551615, 0 to"));
        assert!(refusal(cart(&[(1, MAX_TOTAL), (1, 1)])).contains("product 1 is named with more than"));
        assert!(refusal(cart(&[(1, 1), (2, 1), (3, 1), (4, 1)])).contains("4 products, at most 3"));
        let coins = Cart::new([(1, 1)], "coins".to_owned(), 3);
        assert!(refusal(coins).contains("currency_code: \"coins\""));
        for code in ["NT", "US", "EUR", "TWD"] {
            Cart::new([(1, 1)], code.to_owned(), 3).unwrap();
        }
    }

    #[test]
    fn a_total_never_overflows() {
        let price = MAX_TOTAL / 2;
        assert_eq!(cart(&[(1, 2)]).unwrap().priced(1, &[Some(price)]).unwrap().total, MAX_TOTAL - 1);
        let over = cart(&[(1, 2), (2, 2)]).unwrap().priced(1, &[Some(price), Some(1)]);
        assert!(refusal(over).contains("the total overflows: 2 of product 2 at 1 each"));
        let far_over = cart(&[(1, MAX_TOTAL)]).unwrap().priced(1, &[Some(MAX_TOTAL)]);
        assert!(refusal(far_over).contains("overflows"));
        assert_eq!(refusal(cart(&[(1, 1)]).unwrap().priced(1, &[None])), "product not found");
    }
}
