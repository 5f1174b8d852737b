//! Questions over real sockets: what is answered, and what becomes of replicas that are gone.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use peers::{Addresses, Peers};
use rpc::generated::auth::AuthPayload;
use rpc::generated::auth::auth_service_client::AuthServiceClient;
use rpc::generated::product::product_service_client::ProductServiceClient;
use rpc::generated::product::{CartItem, CheckProductsRequest, GetProductsRequest, Status as Existence};
use serve::auth::{KeySet, Realm, Verifier};
use shop::calls::{CheckProducts, GetProducts, ProductDetails, Unavailable};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::Code;
use tonic::service::Routes;
use tonic::transport::Channel;
use wire::time::Clock;

/// Only a failing test waits this long.
const PATIENCE: Duration = Duration::from_secs(20);

/// A product service that knows product 7, and counts what it is asked.
struct Shop {
    address: SocketAddr,
    asked: Arc<AtomicUsize>,
    /// Of its own, so that its connections end with it.
    runtime: Option<Runtime>,
}

impl Shop {
    async fn start(at: SocketAddr) -> Shop {
        // The port of one that was killed is free a moment later.
        let listener = loop {
            match TcpListener::bind(at).await {
                Ok(listener) => break listener.into_std().expect("a listener"),
                Err(_) => tokio::task::yield_now().await,
            }
        };
        let address = listener.local_addr().expect("an address");
        let asked = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&asked);
        let check = CheckProducts::new(move |ids: Vec<u64>| {
            count.fetch_add(1, Ordering::SeqCst);
            async move { Ok(ids.into_iter().map(|id| (id == 7).then_some(30)).collect()) }
        });
        let get = GetProducts::new(|ids: Vec<u64>| async move {
            if ids.contains(&13) {
                return Err(Unavailable { service: "product", why: "mysql://secret is away".to_owned() });
            }
            let lamp = || "lamp".to_owned();
            let details = ProductDetails {
                id: 7,
                name: lamp(),
                description: lamp(),
                brand_name: lamp(),
                inventory: 4,
                price: 30,
            };
            Ok(if ids.contains(&7) { vec![details] } else { Vec::new() })
        });
        let verifier = Verifier::new(&KeySet::default(), &Realm::default(), Clock::system());
        let routes = rpc::product_service(check, get).merge(rpc::auth_service(verifier));
        let server = tonic::transport::Server::builder().accept_http1(true).add_routes(Routes::from(routes));
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.expect("a runtime");
        runtime.spawn(async move {
            let listener = TcpListener::from_std(listener).expect("a listener");
            server.serve_with_incoming(TcpListenerStream::new(listener)).await.expect("it serves");
        });
        Shop { address, asked, runtime: Some(runtime) }
    }

    async fn anywhere() -> Shop {
        Shop::start(SocketAddr::from(([127, 0, 0, 1], 0))).await
    }

    fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }

    /// Its connections are cut, and nobody listens any more.
    fn kill(self) -> SocketAddr {
        self.address
    }
}

impl Drop for Shop {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// Replicas at these places (`host:port`, separated by commas), watched until the test ends.
fn replicas(places: &str) -> Peers<Channel> {
    let places: Addresses = places.parse().expect("addresses");
    let replicas = Peers::new("product", places, rpc::channel);
    tokio::spawn(replicas.clone().run(CancellationToken::new()));
    replicas
}

#[tokio::test]
async fn what_is_asked_is_answered_as_the_protos_say() {
    let shop = Shop::anywhere().await;
    let mut products = ProductServiceClient::new(rpc::channel(shop.address));
    let item = |product_id| CartItem { product_id, amount: 1 };
    let question = CheckProductsRequest { cart_items: vec![item(8), item(7)] };
    let told = products.check_products(question).await.expect("an answer").into_inner().product_statuses;
    assert_eq!((told[0].product_id, told[0].price, told[0].status()), (8, 0, Existence::NotFound));
    assert_eq!((told[1].product_id, told[1].price, told[1].status()), (7, 30, Existence::Ok));

    let question = GetProductsRequest { product_ids: vec![8, 7] };
    let told = products.get_products(question).await.expect("an answer").into_inner().products;
    assert_eq!(told.len(), 1);
    assert_eq!((told[0].product_name.as_str(), told[0].inventory, told[0].price), ("lamp", 4, 30));

    let question = GetProductsRequest { product_ids: (0..1_001).collect() };
    let refused = products.get_products(question).await.expect_err("too many");
    assert_eq!(refused.code(), Code::InvalidArgument);
    let question = GetProductsRequest { product_ids: vec![13] };
    let refused = products.get_products(question).await.expect_err("its database is away");
    assert_eq!((refused.code(), refused.message()), (Code::Unavailable, "product is not available"));

    let mut tokens = AuthServiceClient::new(rpc::channel(shop.address));
    let forged = AuthPayload { access_token: "forged".to_owned() };
    let refused = tokens.auth(forged).await.expect_err("no such token");
    assert_eq!(refused.code(), Code::Unauthenticated);
}

#[tokio::test]
async fn a_price_is_asked_for_once_and_a_product_that_is_missing_each_time() {
    let shop = Shop::anywhere().await;
    let check = rpc::check_products(replicas(&shop.address.to_string()));
    assert_eq!(check.ask(vec![7, 8]).await.expect("an answer"), [Some(30), None]);
    assert_eq!(check.ask(vec![7]).await.expect("an answer"), [Some(30)]);
    assert_eq!(shop.asked(), 1);
    assert_eq!(check.ask(vec![8, 7, 7]).await.expect("an answer"), [None, Some(30), Some(30)]);
    assert_eq!(shop.asked(), 2);
}

#[tokio::test]
async fn all_replicas_are_asked_and_the_dead_ones_are_left_out_until_they_are_back() {
    let (first, second) = (Shop::anywhere().await, Shop::anywhere().await);
    let check = rpc::check_products(replicas(&format!("{},{}", first.address, second.address)));
    let missing = async || check.ask(vec![8]).await.expect("somebody answers");
    for _ in 0..100 {
        missing().await;
    }
    // One at random of those that are equally busy: less than one in a billion that one gets so few of a hundred.
    assert!(first.asked() >= 20 && second.asked() >= 20, "{} and {}", first.asked(), second.asked());

    let address = first.kill();
    for _ in 0..50 {
        missing().await;
    }
    let back = Shop::start(address).await;
    let asked_again = async {
        while back.asked() == 0 {
            missing().await;
        }
    };
    tokio::time::timeout(PATIENCE, asked_again).await.expect("it should be asked again by now");

    second.kill();
    back.kill();
    let refused = async {
        loop {
            if let Err(refused) = check.ask(vec![8]).await {
                return refused;
            }
        }
    };
    let refused = tokio::time::timeout(PATIENCE, refused).await.expect("nobody is left");
    assert_eq!(refused.service, "product");
    let back = Shop::start(address).await;
    let answered = async { while check.ask(vec![8]).await.is_err() {} };
    tokio::time::timeout(PATIENCE, answered).await.expect("it should answer by now");
    assert!(back.asked() > 0);
}

#[tokio::test]
async fn a_name_stands_for_its_addresses() {
    let shop = Shop::anywhere().await;
    let check = rpc::check_products(replicas(&format!("localhost:{}", shop.address.port())));
    let answered = async {
        while check.ask(vec![7]).await.is_err() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, answered).await.expect("the name should be known by now");

    // And what is at one of them may die and come back.
    let missing = async || check.ask(vec![8]).await.is_ok();
    let address = shop.kill();
    let refused = async { while missing().await {} };
    tokio::time::timeout(PATIENCE, refused).await.expect("nobody is there any more");
    let back = Shop::start(address).await;
    let answered = async { while !missing().await {} };
    tokio::time::timeout(PATIENCE, answered).await.expect("it should answer by now");
    assert!(back.asked() > 0);
}
