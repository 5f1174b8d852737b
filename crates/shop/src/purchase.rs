//! What the shop's services tell each other in a saga's input: the purchase, as it was accepted.

use bus::Subject;
use bytes::Bytes;
use prost::Message as _;

/// The name of the purchase saga's definition.
pub const PURCHASE_SAGA: &str = "purchase";
/// The version of the definition by which new purchases run.
pub const PURCHASE_SAGA_VERSION: u32 = 1;

/// Where orchestrators take their messages from.
pub const ORCHESTRATOR: Subject = Subject("saga.orchestrator");
/// Where the product service takes its commands from.
pub const INVENTORY_COMMANDS: Subject = Subject("saga.purchase.inventory");
/// Where the order service takes its commands from.
pub const ORDER_COMMANDS: Subject = Subject("saga.purchase.order");
/// Where the payment service takes its commands from.
pub const PAYMENT_COMMANDS: Subject = Subject("saga.purchase.payment");
/// Where the purchase service hears how its sagas get on.
pub const PURCHASE_PROGRESS: Subject = Subject("saga.purchase.progress");

/// A step of the purchase saga.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum PurchaseStep {
    /// Reserve the stock.
    UpdateProductInventory,
    /// Create the order.
    CreateOrder,
    /// Take the payment.
    CreatePayment,
}

impl PurchaseStep {
    /// The step's name in the HTTP API.
    pub fn name(self) -> &'static str {
        match self {
            PurchaseStep::UpdateProductInventory => "UPDATE_PRODUCT_INVENTORY",
            PurchaseStep::CreateOrder => "CREATE_ORDER",
            PurchaseStep::CreatePayment => "CREATE_PAYMENT",
        }
    }

    /// Where its participant takes commands from.
    pub fn commands(self) -> Subject {
        match self {
            PurchaseStep::UpdateProductInventory => INVENTORY_COMMANDS,
            PurchaseStep::CreateOrder => ORDER_COMMANDS,
            PurchaseStep::CreatePayment => PAYMENT_COMMANDS,
        }
    }
}

/// The purchase saga: reserve the stock, create the order, take the payment, which decides.
pub fn purchase_saga() -> saga::Definition<PurchaseStep> {
    saga::Definition::new(PURCHASE_SAGA, PURCHASE_SAGA_VERSION)
        .compensatable(PurchaseStep::UpdateProductInventory)
        .compensatable(PurchaseStep::CreateOrder)
        .pivot(PurchaseStep::CreatePayment)
        .build()
}

/// One line of a cart.
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
pub struct PurchasedItem {
    /// The product.
    #[prost(uint64, tag = "1")]
    pub product_id: u64,
    /// How many of it, at least 1.
    #[prost(int64, tag = "2")]
    pub amount: i64,
    /// What one of it cost when the purchase was accepted, in the currency's unit as given.
    #[prost(int64, tag = "3")]
    pub price: i64,
}

/// A purchase as it was accepted: the input of its saga. No step changes it.
#[derive(Clone, PartialEq, Eq, prost::Message)]
pub struct Purchase {
    /// Who buys.
    #[prost(uint64, tag = "1")]
    pub customer_id: u64,
    /// What: each product once, sorted by its id.
    #[prost(message, repeated, tag = "2")]
    pub items: Vec<PurchasedItem>,
    /// `NT`, `US` or an ISO 4217 code.
    #[prost(string, tag = "3")]
    pub currency_code: String,
    /// The sum of amount x price over the items; it did not overflow.
    #[prost(int64, tag = "4")]
    pub total: i64,
}

/// A saga's input that is no purchase.
#[derive(Debug, thiserror::Error)]
#[error("not a purchase: {0}")]
pub struct NotAPurchase(#[from] prost::DecodeError);

impl Purchase {
    /// The bytes of the saga's input.
    pub fn to_input(&self) -> Bytes {
        self.encode_to_vec().into()
    }

    /// Reads a saga's input.
    ///
    /// # Errors
    /// [`NotAPurchase`] when it is something else.
    pub fn from_input(input: &Bytes) -> Result<Purchase, NotAPurchase> {
        Ok(Purchase::decode(input.clone())?)
    }

    /// Who buys, by a saga's input; the rest of it is skipped. Customer 0 where none is named: no purchase is theirs.
    ///
    /// # Errors
    /// [`NotAPurchase`] when it is no message at all.
    pub fn buyer(input: &Bytes) -> Result<u64, NotAPurchase> {
        #[derive(Clone, Copy, prost::Message)]
        struct Buyer {
            #[prost(uint64, tag = "1")]
            customer_id: u64,
        }
        Ok(Buyer::decode(input.clone())?.customer_id)
    }
}
