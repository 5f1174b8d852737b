//! Puts a question to one of several replicas, and to another one if that does not answer.
//!
//! tonic's own balancer goes on picking endpoints that are down; [`Peers`] leaves them out until they answer again.

use std::net::SocketAddr;
use std::time::Duration;

use peers::{CONNECT_TIMEOUT, Choice, Peers};
use telemetry::spans::{self, Detail, ERROR_TYPE, Kind, Step, TRACEPARENT, within};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Status};

/// How long one replica may take to answer. It is told so with the call.
pub const CALL_TIMEOUT: Duration = Duration::from_secs(2);
/// How many replicas one question is put to at most.
const ATTEMPTS: usize = 3;
/// How often a connection is probed, and how long the answer may take, so that a peer that is gone without a word is noticed.
const KEEP_ALIVE: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(5));

/// The link to a replica: it connects when it is used, and again when it has lost its connection.
pub fn channel(address: SocketAddr) -> Channel {
    probed_channel(address, KEEP_ALIVE)
}

fn probed_channel(address: SocketAddr, (interval, patience): (Duration, Duration)) -> Channel {
    let endpoint = Endpoint::from_shared(format!("http://{address}")).expect("an address makes a URI");
    endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(interval)
        .keep_alive_timeout(patience)
        .keep_alive_while_idle(true)
        .connect_lazy()
}

/// Asks something that changes nothing: it may be asked more than once.
///
/// # Errors
/// The last replica's answer, or UNAVAILABLE if none can be reached.
pub(crate) async fn ask<T, F>(
    replicas: &Peers<Channel>,
    method: &'static str,
    question: impl Fn(Channel) -> F,
) -> Result<T, Status>
where
    F: Future<Output = Result<T, Status>>,
{
    let mut tried = Vec::new();
    let mut refused = Status::unavailable(format!("no replica of {} can be reached", replicas.service()));
    while tried.len() < ATTEMPTS {
        // Where none can be reached, as far as is known, one may be back.
        let picked = replicas.pick(Choice::LeastBusy, &tried);
        let Some(picked) = picked.or_else(|| replicas.pick_lost(Choice::LeastBusy, &tried)) else { break };
        tried.push(picked.address());
        let span = spans::step(Kind::Client, || method);
        let asked = within(span.as_ref().map(Step::current), question(picked.link().clone()));
        let answer = tokio::time::timeout(CALL_TIMEOUT, asked).await;
        if let Some(span) = span {
            let details = [
                ("rpc.system", Detail::Name("grpc")),
                ("rpc.method", Detail::Name(method)),
                (ERROR_TYPE, Detail::Name("no answer")),
            ];
            span.end(if matches!(answer, Ok(Ok(_))) { &details[..2] } else { &details });
        }
        let late = |_| Err(Status::deadline_exceeded(format!("no answer within {CALL_TIMEOUT:?}")));
        match answer.unwrap_or_else(late) {
            Err(status) if is_out(&status) => {
                tracing::debug!(replica = %picked.address(), %status, "a replica does not answer");
                // A source is an error of tonic's: no connection, or that it was the first to see that the time is over.
                if std::error::Error::source(&status).is_some() || status.code() == Code::DeadlineExceeded {
                    picked.unreachable();
                }
                refused = status;
            }
            answer => {
                picked.reached();
                return answer;
            }
        }
    }
    Err(refused)
}

/// A message for another service, with the time that it has for its answer and the trace that it is part of, if that is recorded.
pub(crate) fn call<M>(message: M) -> Request<M> {
    let mut request = Request::new(message);
    request.set_timeout(CALL_TIMEOUT);
    if let Some(current) = spans::current()
        && let Ok(value) = current.first().to_string().parse()
    {
        request.metadata_mut().insert(TRACEPARENT, value);
    }
    request
}

/// Whether it says that the replica, not the question, is at fault: then another one may have the answer.
fn is_out(status: &Status) -> bool {
    match status.code() {
        Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled => true,
        // The connection broke under the call.
        Code::Unknown => std::error::Error::source(status).is_some(),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use tokio::io::AsyncReadExt;
    use tokio::net::TcpListener;
    use tokio::time::timeout;

    use crate::generated::auth::AuthPayload;
    use crate::generated::auth::auth_service_client::AuthServiceClient;

    /// Only a failing test waits this long.
    const PATIENCE: Duration = Duration::from_secs(20);

    #[tokio::test]
    async fn a_connection_whose_peer_is_gone_without_a_word_is_closed() {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let short = Duration::from_millis(20);
        let mut client = AuthServiceClient::new(probed_channel(address, (short, short)));
        let silent = async {
            let (mut stream, _) = listener.accept().await.expect("a connection");
            let mut sent = Vec::new();
            // It may be reset, which is as good as an end.
            let _ = stream.read_to_end(&mut sent).await;
            sent
        };
        let both = async { tokio::join!(client.auth(AuthPayload::default()), silent) };
        let (answer, sent) = timeout(PATIENCE, both).await.expect("it should be closed by now");
        assert!(is_out(&answer.expect_err("nobody is there")));
        assert!(sent.starts_with(b"PRI * HTTP/2.0"));
    }
}
