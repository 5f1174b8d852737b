//! A door with one address, in front of a shop that moves to another port with each start.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// Hands on what comes in, byte by byte, until it is dropped.
pub(crate) struct Door {
    address: SocketAddr,
    shop: watch::Sender<String>,
    keep: Arc<AtomicUsize>,
    task: tokio::task::JoinHandle<()>,
}

impl Door {
    /// A door that leads to the shop at this URL.
    pub(crate) async fn open(base: &str) -> Door {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (shop, now) = watch::channel(base.to_owned());
        let keep = Arc::new(AtomicUsize::new(0));
        let kept = Arc::clone(&keep);
        let task = tokio::spawn(async move {
            while let Ok((outside, _)) = listener.accept().await {
                let address = now.borrow().trim_start_matches("http://").to_owned();
                tokio::spawn(hand_on(outside, address, Arc::clone(&kept)));
            }
        });
        Door { address, shop, keep, task }
    }

    pub(crate) fn base(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The shop is there now.
    pub(crate) fn leads_to(&self, base: &str) {
        self.shop.send_replace(base.to_owned());
    }

    /// The next so many answers that name a purchase stay here, and their connections are closed.
    pub(crate) fn keeps_next_purchase_answers(&self, count: usize) {
        self.keep.store(count, Ordering::SeqCst);
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Until either side closes. A shop that is not there closes at once.
async fn hand_on(outside: TcpStream, shop: String, keep: Arc<AtomicUsize>) {
    let Ok(inside) = TcpStream::connect(shop).await else { return };
    let (mut from_outside, mut to_outside) = outside.into_split();
    let (mut from_inside, mut to_inside) = inside.into_split();
    let requests = async { tokio::io::copy(&mut from_outside, &mut to_inside).await.map(|_| ()) };
    let answers = async {
        let mut buffer = vec![0; 64 * 1024];
        loop {
            let count = from_inside.read(&mut buffer).await?;
            if count == 0 {
                return Ok(());
            }
            let answer = buffer[..count].starts_with(b"HTTP/1.1 201");
            let less = |left: usize| left.checked_sub(1);
            if answer && keep.fetch_update(Ordering::SeqCst, Ordering::SeqCst, less).is_ok() {
                return Ok(());
            }
            to_outside.write_all(&buffer[..count]).await?;
        }
    };
    // A connection that breaks is one that is closed.
    let _: Result<(), std::io::Error> = tokio::select! {
        done = requests => done,
        done = answers => done,
    };
}
