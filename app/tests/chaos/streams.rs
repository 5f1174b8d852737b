//! Event streams over replicas: row 21 of the list of faults.

use std::collections::BTreeMap;
use std::io;
use std::time::Duration;

use testkit::traffic::{Cart, Customer, Product};
use testkit::{Client, Engines, Replica, Shop, SseEvent, TempDir};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

use super::{SOON, options, turn};

/// Customers with streams that nobody reads, and how many each has: one less than is allowed.
const IDLE_CUSTOMERS: usize = 33;
const STREAMS_EACH: usize = 31;
const IDLERS: usize = IDLE_CUSTOMERS * STREAMS_EACH;
/// What a client's kernel takes for it, in bytes; the system makes that at least a few kilobytes.
const RECEIVE_BYTES: u32 = 4 * 1024;
/// Purchases of one of them, and of each other.
const PURCHASES: usize = 480;
const PURCHASES_OF_OTHERS: usize = 2;
/// Those that are asked for at a time.
const AT_ONCE: usize = 16;
/// What a process may have for each such stream, in KiB: what waits for it, which is bounded, and its connections.
const KIB_PER_IDLER: u64 = 128;

/// What a process holds in memory, in KiB.
fn resident_kib(replica: &Replica) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", replica.pid.unwrap())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// What was told of each purchase: the numbers must come without a gap, and none behind the last event.
#[derive(Default)]
struct Told {
    seqs: BTreeMap<u64, u64>,
    ended: BTreeMap<u64, u64>,
    last_event_id: String,
}

impl Told {
    fn hear(&mut self, event: &SseEvent, from: &str) {
        let data: serde_json::Value = serde_json::from_str(&event.data).unwrap();
        let (purchase, seq) = (data["purchase_id"].as_u64().unwrap(), data["seq"].as_u64().unwrap());
        let last = self.seqs.insert(purchase, seq).unwrap_or_default();
        assert_eq!(seq, last + 1, "{from}: purchase {purchase}");
        assert!(!self.ended.contains_key(&purchase), "{from}: purchase {purchase} goes on after its end");
        let (step, status) = (data["step"].as_str().unwrap(), data["status"].as_str().unwrap());
        if matches!(
            (step, status),
            ("CREATE_PAYMENT", "STATUS_SUCCESS")
                | ("UPDATE_PRODUCT_INVENTORY", "STATUS_ROLLBACKED" | "STATUS_FAILED")
        ) {
            self.ended.insert(purchase, seq);
        }
        self.last_event_id = event.id.clone();
    }
}

async fn buy(client: &Client, customer: &Customer, cart: &Cart) -> u64 {
    let answer = customer.buy(client, cart, None).await.unwrap();
    assert_eq!(answer.status, 201, "{}", answer.body);
    answer.json()["purchase_id"].as_u64().unwrap()
}

fn purchase_replicas(replicas: &[Replica]) -> Vec<&Replica> {
    replicas.iter().filter(|replica| replica.service == "purchase").collect()
}

/// One client goes from replica to replica behind every event that it gets, while both accept its purchases.
async fn a_stream_moves(shop: &Shop) {
    const ROUNDS: usize = 12;
    let client = shop.client();
    let customer = Customer::sign_up(&client, 1).await;
    let kettle = Product::create(&client, "kettle", 100, 1_000).await;
    let dear = Product::create(&client, "ring", testkit::traffic::PAYMENT_LIMIT + 1, 1_000).await;
    let replicas = shop.replicas().await;
    let replicas: Vec<_> = purchase_replicas(&replicas).into_iter().map(Replica::client).collect();

    let mut told = Told { last_event_id: "0".to_owned(), ..Told::default() };
    let (mut bought, mut moves) = (Vec::new(), 0);
    for round in 0..ROUNDS {
        for product in [kettle, dear] {
            let cart = Cart { lines: vec![(product.id, 1)] };
            bought.push(buy(&replicas[round % 2], &customer, &cart).await);
        }
        // One event from each in turn; in every other round all that there is.
        while !bought.iter().all(|id| told.ended.contains_key(id)) {
            let from = &replicas[moves % 2];
            moves += 1;
            let mut events = from.events(&customer.token, Some(&told.last_event_id)).await.unwrap();
            let event = events.next(SOON).await.unwrap();
            told.hear(&event, from.base());
            if round % 2 == 1 {
                while let Some(event) = events.next(Duration::from_millis(20)).await {
                    told.hear(&event, from.base());
                }
            }
        }
    }
    bought.sort_unstable();
    assert_eq!(told.seqs.keys().copied().collect::<Vec<_>>(), bought);
    println!("{} events of {} purchases, {moves} moves", told.seqs.values().sum::<u64>(), bought.len());
}

/// Opens a stream and reads its head, and nothing more.
async fn idle(address: &str, token: &str) -> io::Result<TcpStream> {
    let socket = TcpSocket::new_v4()?;
    socket.set_recv_buffer_size(RECEIVE_BYTES)?;
    let mut stream = socket.connect(address.parse().map_err(io::Error::other)?).await?;
    let request = format!(
        "GET /api/purchase/result HTTP/1.1\r\nhost: shop\r\nauthorization: bearer {token}\r\naccept: text/event-stream\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await?;
    let mut head = [0; 12];
    stream.read_exact(&mut head).await?;
    assert_eq!(&head, b"HTTP/1.1 200", "{}", String::from_utf8_lossy(&head));
    Ok(stream)
}

/// A thousand clients open streams and read nothing. One who reads is told everything all the same.
async fn a_thousand_do_not_read(shop: &Shop) {
    let client = shop.client();
    let kettle = Product::create(&client, "kettle", 100, 1_000_000).await;
    let cart = Cart { lines: vec![(kettle.id, 1)] };
    let gateway = client.base().trim_start_matches("http://").to_owned();
    let replicas = shop.replicas().await;
    let watched: Vec<_> = replicas
        .iter()
        .filter(|replica| matches!(replica.service.as_str(), "purchase" | "gateway"))
        .collect();
    let before: Vec<u64> = watched.iter().map(|replica| resident_kib(replica)).collect();
    let (mut customers, mut idlers) = (Vec::new(), Vec::new());
    for number in 0..IDLE_CUSTOMERS {
        let customer = Customer::sign_up(&client, 10 + number).await;
        for _ in 0..STREAMS_EACH {
            idlers.push(idle(&gateway, &customer.token).await.unwrap());
        }
        customers.push(customer);
    }

    let (busy, others) = customers.split_first().unwrap();
    for other in others {
        for _ in 0..PURCHASES_OF_OTHERS {
            buy(&client, other, &cart).await;
        }
    }
    let mut events = client.events(&busy.token, None).await.unwrap();
    let mut told = Told::default();
    for _ in 0..PURCHASES / AT_ONCE {
        let buying = (0..AT_ONCE).map(|_| buy(&client, busy, &cart));
        let bought = futures_util::future::join_all(buying).await;
        while !bought.iter().all(|id| told.ended.contains_key(id)) {
            told.hear(&events.next(SOON).await.unwrap(), "beside those who do not read");
        }
    }
    for (replica, before) in watched.iter().zip(before) {
        let now = resident_kib(replica);
        println!("{}: {before} KiB, with {IDLERS} streams that nobody reads {now} KiB", replica.name);
        assert!(now < before + KIB_PER_IDLER * IDLERS as u64, "{}: {before} KiB, then {now}", replica.name);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_may_move_after_every_event_and_a_thousand_may_not_read() {
    let _turn = turn().await;
    let (dir, engines) = (TempDir::new(), Engines::shared());
    let mut shop = Shop::start(options(&dir, &engines)).await.unwrap();
    a_stream_moves(&shop).await;
    a_thousand_do_not_read(&shop).await;
    let status = shop.terminate().await;
    assert!(status.success(), "{status}:\n{}", testkit::tail(&shop.stderr()));
}
