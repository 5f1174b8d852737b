//! Event streams: opened, read, and opened again where they were cut.

use std::rc::Rc;
use std::time::Instant;

use bytes::Bytes;
use http::header::{ACCEPT, HeaderName};
use http::{HeaderValue, Method, StatusCode, Uri};

use crate::ask::{Asker, request};
use crate::backoff::Backoff;
use crate::customer::Customer;
use crate::desk::Desk;
use crate::http1::{Connection, Stream};
use crate::record::Failure;
use crate::sse::Parser;

const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");
const EVENT_STREAM: HeaderValue = HeaderValue::from_static("text/event-stream");

/// Whose events a stream carries.
pub(crate) enum Follower {
    /// This customer buys: what is told matters.
    Buyer(u32),
    /// This one only listens.
    Listener(Rc<Customer>),
}

/// Follows a stream until all is over. `opened` is called when it was opened, or was refused, for the first time.
pub(crate) async fn follow(desk: Rc<Desk>, follower: Follower, opened: impl FnOnce()) {
    let customer = match &follower {
        Follower::Buyer(place) => &desk.customers[*place as usize],
        Follower::Listener(customer) => customer,
    };
    let mut opened = Some(opened);
    let (mut parser, mut backoff) = (Parser::default(), Backoff::default());
    let work = async {
        loop {
            let stream = open(&desk, customer, &mut parser).await;
            if let Some(opened) = opened.take() {
                opened();
            }
            let asked = match stream {
                Ok(mut stream) => {
                    backoff = Backoff::default();
                    read(&desk, &follower, &mut stream, &mut parser).await;
                    parser.cut();
                    desk.recorder.borrow_mut().failed(Instant::now(), Failure::StreamCut);
                    None
                }
                Err(asked) => {
                    desk.recorder.borrow_mut().failed(Instant::now(), Failure::NoStream);
                    asked
                }
            };
            tokio::time::sleep(backoff.next(asked)).await;
        }
    };
    tokio::select! {
        () = work => {}
        () = desk.over.cancelled() => {}
    }
}

/// Opens the stream behind the last event that was read. If not, there may be a time that the shop asks to wait.
async fn open(
    desk: &Desk,
    customer: &Customer,
    parser: &mut Parser,
) -> Result<Stream, Option<std::time::Duration>> {
    let options = &desk.plan.options;
    for renewed in [false, true] {
        let bearer = customer.bearer();
        let path = Uri::from_static("/api/purchase/result");
        let mut request = request(&options.url, Method::GET, path, Some(&bearer), Bytes::new());
        request.headers_mut().insert(ACCEPT, EVENT_STREAM);
        if let Some(id) = HeaderValue::from_bytes(parser.last_id()).ok().filter(|id| !id.is_empty()) {
            request.headers_mut().insert(LAST_EVENT_ID, id);
        }
        let limit = options.request_timeout;
        let connection = Connection::open(&options.url, limit).await.map_err(|_| None)?;
        match connection.stream(request, limit).await.map_err(|_| None)? {
            Ok(stream) => return Ok(stream),
            Err(refused) if refused.status == StatusCode::UNAUTHORIZED && !renewed => {
                if !customer.renew(&bearer, &mut Asker::new(&options.url, limit)).await {
                    return Err(None);
                }
            }
            // The shop does not know this id: better from the beginning than not at all.
            Err(refused) if refused.status == StatusCode::BAD_REQUEST => {
                *parser = Parser::default();
                return Err(None);
            }
            Err(refused) => return Err(refused.retry_after),
        }
    }
    Err(None)
}

async fn read(desk: &Desk, follower: &Follower, stream: &mut Stream, parser: &mut Parser) {
    while let Some(chunk) = stream.chunk().await {
        let now = Instant::now();
        match follower {
            Follower::Buyer(customer) => parser.feed(&chunk, |data| desk.told(*customer, data, now)),
            Follower::Listener(_) => parser.feed(&chunk, |_| {}),
        }
    }
}
