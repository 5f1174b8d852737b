//! What an event says about a purchase.

use std::sync::LazyLock;

use memchr::memmem::Finder;
use serde::Deserialize;

/// A step of a purchase.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Step {
    /// The reservation.
    Stock,
    /// The order.
    Order,
    /// The payment, which decides.
    Payment,
}

impl Step {
    pub(crate) const ALL: [Step; 3] = [Step::Stock, Step::Order, Step::Payment];

    /// The name in the API.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Step::Stock => "UPDATE_PRODUCT_INVENTORY",
            Step::Order => "CREATE_ORDER",
            Step::Payment => "CREATE_PAYMENT",
        }
    }
}

/// News of a purchase, as far as they matter here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum News {
    /// It is paid.
    Committed,
    /// A step after the first said no; what was done before is going to be undone.
    Refused(Step),
    /// The first step said no: nothing was done.
    RefusedAtOnce,
    /// The first step is undone, which is the last thing to be.
    RolledBack,
    /// The first step could not be undone.
    NotRolledBack,
}

/// An event that matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Told {
    pub(crate) purchase_id: u64,
    pub(crate) news: News,
}

#[derive(Deserialize)]
struct Event<'a> {
    purchase_id: u64,
    #[serde(borrow)]
    step: &'a str,
    #[serde(borrow)]
    status: &'a str,
}

/// Of a step that has begun. In quotes: within a text they would be escaped.
static BEGUN: LazyLock<Finder<'static>> = LazyLock::new(|| Finder::new("\"STATUS_EXECUTE\""));
/// Words of which an event that matters has one.
static WORDS: LazyLock<[Finder<'static>; 3]> =
    LazyLock::new(|| ["CREATE_PAYMENT", "STATUS_FAILED", "STATUS_ROLLBACK"].map(Finder::new));

/// Reads an event's data. None where it says nothing that matters, or nothing that is known.
pub(crate) fn read(data: &[u8]) -> Option<Told> {
    // Most events do not matter, and reading JSON costs ten times as much as looking for words.
    if BEGUN.find(data).is_some() || !WORDS.iter().any(|word| word.find(data).is_some()) {
        return None;
    }
    let Event { purchase_id, step, status } = serde_json::from_slice(data).ok()?;
    let step = Step::ALL.into_iter().find(|known| known.name() == step)?;
    let news = match (step, status) {
        (Step::Payment, "STATUS_SUCCESS") => News::Committed,
        (Step::Stock, "STATUS_FAILED") => News::RefusedAtOnce,
        (Step::Stock, "STATUS_ROLLBACKED") => News::RolledBack,
        (Step::Stock, "STATUS_ROLLBACK_FAIL") => News::NotRolledBack,
        (Step::Order | Step::Payment, "STATUS_FAILED") => News::Refused(step),
        _ => return None,
    };
    Some(Told { purchase_id, news })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_matters_is_read_in_any_order_of_fields() {
        let told = |purchase_id, news| Some(Told { purchase_id, news });
        for (data, expected) in [
            (
                r#"{"purchase_id":7,"step":"CREATE_PAYMENT","status":"STATUS_SUCCESS","timestamp":1,"seq":6}"#,
                told(7, News::Committed),
            ),
            (
                r#"{"timestamp":1,"status":"STATUS_ROLLBACKED","step":"UPDATE_PRODUCT_INVENTORY","purchase_id":18446744073709551615}"#,
                told(u64::MAX, News::RolledBack),
            ),
            (
                r#"{"purchase_id":7,"step":"CREATE_ORDER","status":"STATUS_FAILED","reason":"a \"no\""}"#,
                told(7, News::Refused(Step::Order)),
            ),
            (
                r#"{"purchase_id":7,"step":"UPDATE_PRODUCT_INVENTORY","status":"STATUS_FAILED"}"#,
                told(7, News::RefusedAtOnce),
            ),
            (
                r#"{"purchase_id":7,"step":"UPDATE_PRODUCT_INVENTORY","status":"STATUS_ROLLBACK_FAIL"}"#,
                told(7, News::NotRolledBack),
            ),
            (
                r#"{"purchase_id":7,"step":"CREATE_PAYMENT","status":"STATUS_FAILED","reason":"\"STATUS_EXECUTE\""}"#,
                told(7, News::Refused(Step::Payment)),
            ),
        ] {
            assert_eq!(read(data.as_bytes()), expected, "{data}");
        }
    }

    #[test]
    fn anything_else_says_nothing() {
        for data in [
            "null",
            "",
            "{}",
            "[]",
            r#"{"purchase_id":7,"step":"CREATE_PAYMENT","status":"STATUS_EXUCUTE"}"#,
            r#"{"purchase_id":7,"step":"CREATE_PAYMENT","status":"STATUS_EXECUTE"}"#,
            r#"{"purchase_id":7,"step":"CREATE_ORDER","status":"STATUS_SUCCESS"}"#,
            r#"{"purchase_id":7,"step":"CREATE_ORDER","status":"STATUS_ROLLBACKED"}"#,
            r#"{"purchase_id":-7,"step":"CREATE_PAYMENT","status":"STATUS_SUCCESS"}"#,
            r#"{"purchase_id":7,"step":"SEND_MAIL","status":"STATUS_SUCCESS"}"#,
        ] {
            assert_eq!(read(data.as_bytes()), None, "{data}");
        }
    }
}
