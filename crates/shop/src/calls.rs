//! Questions that one service asks another and waits for: in one process a function call, between processes gRPC.
//! Whoever asks holds a [`Call`] and cannot tell which.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

/// No answer could be had. Asking again later may help.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{service} is not available: {why}")]
pub struct Unavailable {
    /// The service that was asked.
    pub service: &'static str,
    /// What went wrong.
    pub why: String,
}

type Answer<A> = Pin<Box<dyn Future<Output = Result<A, Unavailable>> + Send>>;

/// A question of type `Q` that is answered with an `A`. Cloning is cheap.
pub struct Call<Q, A>(Arc<dyn Fn(Q) -> Answer<A> + Send + Sync>);

impl<Q, A> Call<Q, A> {
    /// A call that this function answers.
    pub fn new<F, R>(answer: F) -> Call<Q, A>
    where
        F: Fn(Q) -> R + Send + Sync + 'static,
        R: Future<Output = Result<A, Unavailable>> + Send + 'static,
    {
        Call(Arc::new(move |question| Box::pin(answer(question))))
    }

    /// Asks.
    ///
    /// # Errors
    /// [`Unavailable`] when there was no answer.
    pub async fn ask(&self, question: Q) -> Result<A, Unavailable> {
        (self.0)(question).await
    }
}

impl<Q, A> Clone for Call<Q, A> {
    fn clone(&self) -> Self {
        Call(Arc::clone(&self.0))
    }
}

impl<Q, A> std::fmt::Debug for Call<Q, A> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Call")
    }
}

/// `product.ProductService/CheckProducts`: for each id its price, or None where there is no such product; in the
/// order asked.
pub type CheckProducts = Call<Vec<u64>, Vec<Option<i64>>>;

/// `product.ProductService/GetProducts`: what is known of each product that exists; unknown ids are left out.
pub type GetProducts = Call<Vec<u64>, Vec<ProductDetails>>;

/// One product, as other services may know it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProductDetails {
    /// Its id.
    pub id: u64,
    /// Its name.
    pub name: String,
    /// Its description.
    pub description: String,
    /// Its brand's name.
    pub brand_name: String,
    /// How many are left.
    pub inventory: i64,
    /// Its price.
    pub price: i64,
}
