//! The body of a replica's answer, on its way to the client: nothing is gathered, and nothing is read from the replica
//! that the client does not take.

use std::error::Error;
use std::fmt;
use std::pin::Pin;
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use hyper::body::{Frame, Incoming, SizeHint};
use peers::Picked;
use tokio::time::{Instant, Sleep, sleep};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};

use crate::pool::{Place, Pool};

/// How long a replica may say nothing in the middle of an answer. An event stream says something every 15 s.
const SILENCE: Duration = Duration::from_secs(45);

/// A replica stopped in the middle of its answer.
#[derive(Debug)]
struct Silent;

impl fmt::Display for Silent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the replica stopped in the middle of its answer")
    }
}

impl Error for Silent {}

/// The body, and its place on the connection that it comes by. Dropped before its end, it tells the replica that nobody listens.
pub(crate) struct Answer {
    /// Read already.
    first: Option<Bytes>,
    body: Incoming,
    _place: Place,
    replica: Picked<Pool>,
    /// Since when it has said nothing, although the client is ready to hear.
    silent: Option<Instant>,
    silence: Option<Pin<Box<Sleep>>>,
    /// An event stream ends cleanly when the gateway stops or the replica dies: its client resumes elsewhere.
    stream: Option<Pin<Box<WaitForCancellationFutureOwned>>>,
}

impl Answer {
    /// `stop` is given for an event stream.
    pub(crate) fn new(
        body: Incoming,
        place: Place,
        replica: Picked<Pool>,
        stop: Option<&CancellationToken>,
    ) -> Answer {
        let stream = stop.map(|stop| Box::pin(stop.clone().cancelled_owned()));
        Answer { first: None, body, _place: place, replica, silent: None, silence: None, stream }
    }

    /// As a body. One that has arrived already as a whole, as most do, needs no place any more.
    pub(crate) fn into_body(mut self) -> Body {
        if self.body.is_end_stream() {
            return Body::empty();
        }
        let frame = Pin::new(&mut self.body).poll_frame(&mut Context::from_waker(Waker::noop()));
        if let Poll::Ready(Some(Ok(frame))) = frame
            && let Ok(data) = frame.into_data()
        {
            if self.body.is_end_stream() {
                return Body::from(data);
            }
            self.first = Some(data);
        }
        Body::new(self)
    }

    fn poll_silence(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let until = *self.silent.get_or_insert_with(Instant::now) + SILENCE;
        // Not set anew with each piece: it runs out now and then, and is set to when it should.
        let silence = self.silence.get_or_insert_with(|| Box::pin(sleep(SILENCE)));
        loop {
            ready!(silence.as_mut().poll(cx));
            if until <= Instant::now() {
                return Poll::Ready(());
            }
            silence.as_mut().reset(until);
        }
    }
}

impl HttpBody for Answer {
    type Data = Bytes;
    type Error = Box<dyn Error + Send + Sync>;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        if let Some(first) = self.first.take() {
            return Poll::Ready(Some(Ok(Frame::data(first))));
        }
        if let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(cx) {
            return Poll::Ready(match frame {
                Some(Ok(frame)) => {
                    self.silent = None;
                    Some(Ok(frame))
                }
                Some(Err(_)) if self.stream.is_some() => None,
                Some(Err(error)) => Some(Err(error.into())),
                None => None,
            });
        }
        if self.stream.as_mut().is_some_and(|stop| stop.as_mut().poll(cx).is_ready()) {
            return Poll::Ready(None);
        }
        ready!(self.poll_silence(cx));
        self.replica.unreachable();
        Poll::Ready(if self.stream.is_some() { None } else { Some(Err(Silent.into())) })
    }

    fn is_end_stream(&self) -> bool {
        self.first.is_none() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let first = self.first.as_ref().map_or(0, |first| first.len() as u64);
        let rest = self.body.size_hint();
        let mut hint = SizeHint::new();
        hint.set_lower(rest.lower() + first);
        if let Some(upper) = rest.upper() {
            hint.set_upper(upper + first);
        }
        hint
    }
}
