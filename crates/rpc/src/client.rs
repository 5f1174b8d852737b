//! What one service asks another, over gRPC.

use moka::sync::Cache;
use peers::Peers;
use shop::calls::{CheckProducts, GetProducts, ProductDetails, Unavailable};
use tonic::Status;
use tonic::transport::Channel;

use crate::ask::{ask, call};
use crate::generated::product::product_service_client::ProductServiceClient;
use crate::generated::product::{
    CartItem, CheckProductsRequest, GetProductsRequest, Product, Status as Existence,
};

/// Prices that are remembered, about 100 bytes each.
const MAX_REMEMBERED_PRICES: u64 = 100_000;

/// Asks the replicas of the product service which products exist. A product's price never changes, so one that was told
/// is remembered; that there is no such product is not.
pub fn check_products(replicas: Peers<Channel>) -> CheckProducts {
    let prices: Cache<u64, i64> = Cache::builder().max_capacity(MAX_REMEMBERED_PRICES).build();
    CheckProducts::new(move |ids: Vec<u64>| {
        let (replicas, prices) = (replicas.clone(), prices.clone());
        async move {
            let mut known: Vec<Option<i64>> = ids.iter().map(|id| prices.get(id)).collect();
            let missing: Vec<usize> = (0..ids.len()).filter(|place| known[*place].is_none()).collect();
            if missing.is_empty() {
                return Ok(known);
            }
            let item = |place: &usize| CartItem { product_id: ids[*place], amount: 1 };
            let question = CheckProductsRequest { cart_items: missing.iter().map(item).collect() };
            let answer = ask(&replicas, "product.ProductService/CheckProducts", |channel| {
                let question = question.clone();
                async move { ProductServiceClient::new(channel).check_products(call(question)).await }
            });
            let answer = answer.await.map_err(unavailable)?.into_inner().product_statuses;
            let wanted = missing.len();
            if answer.len() != wanted {
                let why = format!("{} answers to {wanted} questions", answer.len());
                return Err(Unavailable { service: "product", why });
            }
            for (place, told) in missing.into_iter().zip(answer) {
                if told.status == Existence::Ok as i32 {
                    prices.insert(told.product_id, told.price);
                    known[place] = Some(told.price);
                }
            }
            Ok(known)
        }
    })
}

/// Asks the replicas of the product service what is known of products.
pub fn get_products(replicas: Peers<Channel>) -> GetProducts {
    GetProducts::new(move |product_ids: Vec<u64>| {
        let replicas = replicas.clone();
        async move {
            let question = GetProductsRequest { product_ids };
            let answer = ask(&replicas, "product.ProductService/GetProducts", |channel| {
                let question = question.clone();
                async move { ProductServiceClient::new(channel).get_products(call(question)).await }
            });
            let details = |product: Product| {
                let Product { product_id: id, product_name: name, description, brand_name, inventory, price } =
                    product;
                ProductDetails { id, name, description, brand_name, inventory, price }
            };
            let products = answer.await.map_err(unavailable)?.into_inner().products;
            Ok(products.into_iter().map(details).collect())
        }
    })
}

fn unavailable(status: Status) -> Unavailable {
    Unavailable { service: "product", why: status.to_string() }
}
