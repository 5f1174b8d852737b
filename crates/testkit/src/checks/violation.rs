//! What must never be, each with the ids at fault.

use std::fmt;

use saga::End;

/// A database of the shop.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Database {
    /// Customers.
    Account,
    /// Products, and the barrier of the stock.
    Product,
    /// Orders and their barrier.
    Order,
    /// Payments and their barrier.
    Payment,
    /// Purchases.
    Purchase,
}

impl Database {
    /// The file's name, without its suffix.
    pub fn name(self) -> &'static str {
        match self {
            Database::Account => "account",
            Database::Product => "product",
            Database::Order => "order",
            Database::Payment => "payment",
            Database::Purchase => "purchase",
        }
    }
}

/// What a step of a purchase leaves behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Effect {
    /// The stock is taken.
    Reservation,
    /// The order is there.
    Order,
    /// The payment is there.
    Payment,
}

impl fmt::Display for Database {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl fmt::Display for Effect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Effect::Reservation => "reservation",
            Effect::Order => "order",
            Effect::Payment => "payment",
        })
    }
}

/// A table of purchases, behind the view of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Table {
    /// What has not ended.
    Open,
    /// What has ended.
    Ended,
    /// What has ended, by customer and id.
    CustomerPurchase,
    /// What has ended, by customer and finish number.
    CustomerEnded,
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Table::Open => "purchase_open",
            Table::Ended => "purchase_ended",
            Table::CustomerPurchase => "customer_purchase",
            Table::CustomerEnded => "customer_ended",
        })
    }
}

/// How the tables of purchases contradict each other. The number in a list is a purchase's id or its finish number, as the
/// list has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs, reason = "each variant's message says what its fields are")]
pub enum Misfiling {
    /// A purchase that is not in exactly one of the two tables.
    #[error("purchase {purchase} has {open} rows in purchase_open and {ended} in purchase_ended")]
    NotInOne { purchase: u64, open: usize, ended: usize },
    /// A purchase that is open or ended, and was not accepted.
    #[error("purchase {purchase} is in {table} and not in purchase_accepted")]
    NotAccepted { purchase: u64, table: Table },
    /// A purchase that is one customer's here and another's there.
    #[error("purchase {purchase} belongs to customer {accepted} and in {table} to customer {found}")]
    OtherCustomer { purchase: u64, table: Table, accepted: u64, found: u64 },
    /// A list that leaves out what ended long enough ago.
    #[error("{table} leaves out {number} of customer {customer}")]
    NotListed { table: Table, customer: u64, number: u64 },
    /// A list that has what did not end, ended too recently, or is another customer's.
    #[error("{table} has {number} of customer {customer}, which should not be there")]
    Listed { table: Table, customer: u64, number: u64 },
    /// Lists that are said to be ahead of what they list.
    #[error("purchases are listed up to the finish number {indexed}; the last one is {last}")]
    ListedBeyond { indexed: u64, last: u64 },
}

/// Something that must never be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[allow(missing_docs, reason = "each variant's message says what its fields are")]
pub enum Violation {
    /// SQLite finds its own file damaged.
    #[error("{database}.db is damaged: {what}")]
    Damaged { database: Database, what: String },

    /// Stock is not what was there less what was sold.
    #[error("I1: product {product} has {found} left; it had {initial} and {sold} are sold")]
    Stock { product: u64, initial: i64, sold: i128, found: i64 },
    /// More was sold than there was.
    #[error("I1: product {product} has {found} left")]
    NegativeStock { product: u64, found: i64 },
    /// A product that the test does not know.
    #[error("I1: product {product} was created by nobody")]
    UnknownProduct { product: u64 },
    /// A product that the test has created.
    #[error("I1: product {product} was created and is not there")]
    LostProduct { product: u64 },

    /// A purchase that was answered 201.
    #[error("I2: purchase {purchase} was answered 201 and does not exist")]
    LostPurchase { purchase: u64 },
    /// Two purchases for one key.
    #[error("I2: customer {customer} has purchases {purchases:?} under the one Idempotency-Key {key:?}")]
    KeyTwice { customer: u64, key: String, purchases: Vec<u64> },
    /// A key that names another purchase than was answered.
    #[error("I2: Idempotency-Key {key:?} was answered with purchase {answered}; the database has {found:?}")]
    KeyMoved { key: String, answered: u64, found: Option<u64> },
    /// A purchase of nobody.
    #[error("I11: purchase {purchase} belongs to customer {customer}, who has no account")]
    UnknownCustomer { purchase: u64, customer: u64 },
    /// An effect that belongs to another customer than its purchase.
    #[error("I11: the {effect} of purchase {purchase} belongs to customer {customer}")]
    WrongCustomer { purchase: u64, effect: Effect, customer: u64 },

    /// More than one answer to one question.
    #[error("I3: {database}.db has {rows} barrier rows for saga {saga}, step {step}, phase {phase}")]
    RepliedTwice { database: Database, saga: u64, step: u8, phase: u8, rows: usize },
    /// More than one effect.
    #[error("I3: purchase {purchase} has {rows} rows as its {effect}")]
    EffectTwice { purchase: u64, effect: Effect, rows: usize },
    /// A participant that answered for another.
    #[error("I3: {database}.db has a barrier row for step {step} of saga {saga}, which is another's")]
    WrongParticipant { database: Database, saga: u64, step: u8 },
    /// A barrier row of no purchase.
    #[error("I3: {database}.db has a barrier row for saga {saga}, which nobody accepted")]
    UnknownSaga { database: Database, saga: u64 },
    /// A reply that nobody can read, or that cannot be one to such a question.
    #[error("I3: the recorded reply of saga {saga}, step {step}, phase {phase} is {what}")]
    WrongReply { saga: u64, step: u8, phase: u8, what: String },
    /// A path that tells something else than the participant recorded.
    #[error(
        "I3: purchase {purchase} has another reply at place {place} of its path than its participant recorded"
    )]
    OtherReply { purchase: u64, place: usize },
    /// A participant that recorded what the path does not tell.
    #[error(
        "I3: the path of purchase {purchase} leaves out the recorded reply to step {step}, phase {phase}"
    )]
    ReplyLeftOut { purchase: u64, step: u8, phase: u8 },

    /// A success without an effect.
    #[error("I4: purchase {purchase} is committed, and its {effect} is not there")]
    NotLive { purchase: u64, effect: Effect },
    /// A failure with an effect.
    #[error("I4: purchase {purchase} is aborted, and its {effect} is there")]
    StillLive { purchase: u64, effect: Effect },
    /// An effect without its barrier row.
    #[error(
        "I4: the {effect} of purchase {purchase} is there, and its participant did not record it as done"
    )]
    EffectAlone { purchase: u64, effect: Effect },
    /// A barrier row without its effect.
    #[error("I4: the {effect} of purchase {purchase} is recorded as done, and is not there")]
    ReplyAlone { purchase: u64, effect: Effect },
    /// An effect of no purchase.
    #[error("I4: there is the {effect} of purchase {purchase}, which nobody accepted")]
    EffectOfNobody { purchase: u64, effect: Effect },

    /// A purchase whose input cannot be read.
    #[error("I5: the input of purchase {purchase} is no purchase: {why}")]
    UnreadableInput { purchase: u64, why: String },
    /// A total that is not the sum. None: it overflows.
    #[error("I5: purchase {purchase} was accepted with a total of {total}; the sum over its cart is {sum:?}")]
    Total { purchase: u64, total: i64, sum: Option<i64> },
    /// A payment that is not the sum over the order. None: it overflows, or there is no readable order.
    #[error("I5: purchase {purchase} was paid with {paid}; the sum over its order is {sum:?}")]
    Paid { purchase: u64, paid: i64, sum: Option<i64> },
    /// An order of something else than was accepted.
    #[error("I5: the order of purchase {purchase} is not its cart: {found}")]
    OtherOrder { purchase: u64, found: String },
    /// A payment in another currency than was accepted.
    #[error("I5: purchase {purchase} was paid in {found:?} instead of {accepted:?}")]
    Currency { purchase: u64, accepted: String, found: String },
    /// Money that came from nowhere, or went there.
    #[error("I5: all payments are {payments}; all committed purchases are {committed}")]
    SumOfPayments { payments: i128, committed: i128 },

    /// A purchase that has not ended.
    #[error("I6: purchase {purchase} is open; it is due at {next_wake_at:?} (Unix ms)")]
    Open { purchase: u64, next_wake_at: Option<u64> },
    /// A purchase that nobody will ever look after.
    #[error("I6: purchase {purchase} is open and will never be looked after: next_wake_at is null")]
    NeverDue { purchase: u64 },
    /// A purchase that needs an operator without the test having poisoned it.
    #[error("I6: purchase {purchase} needs an operator: {reason:?}")]
    Parked { purchase: u64, reason: Option<String> },
    /// A state that there is not.
    #[error("I6: purchase {purchase} has the state {state}")]
    UnknownState { purchase: u64, state: i64 },

    /// An id that JavaScript cannot hold, or that is 0.
    #[error("I10: {database}.db has the id {id}, outside of 1..2^53")]
    IdOutOfRange { database: Database, id: u64 },
    /// An id that was given out twice.
    #[error("I10: {database}.db has {rows} rows with the id {id}")]
    IdTwice { database: Database, id: u64, rows: usize },

    /// An ended purchase without a history, or with one that cannot be read.
    #[error("I12: the path of purchase {purchase} cannot be read: {why}")]
    UnreadablePath { purchase: u64, why: String },
    /// A history that no saga can have.
    #[error("I12: purchase {purchase} has a path that no purchase can have: {why}")]
    IllegalPath { purchase: u64, why: String },
    /// A history that ends otherwise than the purchase did. None: it does not end.
    #[error("I12: purchase {purchase} has state {state}, reason {reason:?}; its path ends {end:?}")]
    OtherEnd { purchase: u64, state: i64, reason: Option<String>, end: Option<End> },
    /// A purchase that has not ended and has a history.
    #[error("I12: purchase {purchase} has not ended, and has a path or a finish number already")]
    EndedTooEarly { purchase: u64 },
    /// Numbers of ended purchases that leave a gap, repeat, or go beyond the last one.
    #[error(
        "I12: the ended purchases should have the numbers 1 to {last}; {purchases:?} have other or the same ones"
    )]
    FinishNumbers { last: u64, purchases: Vec<u64> },

    /// Tables of purchases that contradict each other.
    #[error("I2: {0}")]
    Misfiled(Misfiling),
}
