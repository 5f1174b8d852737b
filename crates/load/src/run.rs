//! A run from its beginning to its end: set up, load, drain, verify, report.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use tokio::signal::ctrl_c;
use tokio::sync::{mpsc, watch};

use crate::carts::{Carts, Products};
use crate::cpu;
use crate::desk::Plan;
use crate::live::Live;
use crate::options::{Conflict, Options};
use crate::report::{Facts, Report};
use crate::resolve::resolve;
use crate::setup::{self, SetupFailed, Tokens};
use crate::verify::verify;
use crate::worker::{Harvest, Message, Share, Stage, work};

/// Files that the load generator needs beside its connections: its own, and those for asking.
const OTHER_FILES: u64 = 128;
/// Between the decision to begin and the beginning, so that all threads begin together.
const RUN_UP: Duration = Duration::from_millis(20);

/// How often it is looked whether a thread has failed before it was ready.
const LOOK_AFTER_THREADS: Duration = Duration::from_millis(100);

/// Why there is no result.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Options that do not fit together.
    #[error(transparent)]
    Options(#[from] Conflict),
    /// The shop could not be prepared.
    #[error(transparent)]
    Setup(#[from] SetupFailed),
    /// The system allows too few open files.
    #[error("{needed} connections are asked for, and this process may open {allowed} files (ulimit -n)")]
    Files {
        /// Connections.
        needed: u64,
        /// Open files that the system allows.
        allowed: u64,
    },
    /// The series cannot be written.
    #[error("cannot write {path:?}: {source}")]
    Series {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The system gives no thread or no runtime.
    #[error("cannot start the load generator's threads: {0}")]
    Threads(#[source] io::Error),
    /// A thread of the load generator has panicked.
    #[error("a thread of the load generator has failed")]
    ThreadFailed,
}

impl Error {
    /// Whether it is about what was asked for, not about what happened.
    pub fn is_usage(&self) -> bool {
        matches!(self, Error::Options(_))
    }
}

/// Puts a shop under load, and says what happened.
///
/// # Errors
/// [`Error`], when there is nothing to say.
pub fn run(options: &Options) -> Result<Report, Error> {
    options.check()?;
    let files = rlimit::increase_nofile_limit(u64::MAX).unwrap_or(u64::MAX);
    let needed =
        u64::from(options.buyers) + u64::from(options.buying_customers()) + u64::from(options.streams);
    if needed + OTHER_FILES > files {
        return Err(Error::Files { needed, allowed: files });
    }
    let series = options.series.as_deref();
    let mut live = Live::new(options.threads(), options.quiet, series)
        .map_err(|source| Error::Series { path: series.unwrap_or("".as_ref()).to_owned(), source })?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(Error::Threads)?.block_on(lead(options, &mut live))
}

async fn lead(options: &Options, live: &mut Live) -> Result<Report, Error> {
    let run = fastrand::u64(..);
    let target = &options.url;
    let (buying, listening) = (options.buying_customers(), options.listening_customers());
    let mut products = Products::planned(options);
    setup::products(target, products.all_mut(), options.admin_token.as_deref(), run).await?;
    let mut customers = setup::customers(target, buying + listening, run).await?;
    let listeners = customers.split_off(buying as usize);
    let carts = Carts::new(options, &products);
    let plan = Arc::new(Plan { options: options.clone(), products, carts, run });

    let (stage, _) = watch::channel(Stage::Preparing);
    let (sender, mut messages) = mpsc::unbounded_channel();
    let threads = spawn(&plan, customers, listeners, &stage, sender)?;
    let mut end = wait_ready(&mut messages, &threads).await;

    let begin = Instant::now() + RUN_UP;
    let window = begin + options.warm_up;
    let until = window + options.duration;
    if end.is_none() {
        stage.send_replace(Stage::Running(begin));
    }
    let (mut cpu_before, mut cpu_after) = (None, None);
    let mut drained_at = until + options.drain;
    loop {
        let now = Instant::now();
        if now >= window && cpu_before.is_none() {
            cpu_before = cpu::used();
        }
        if now >= until && cpu_after.is_none() {
            cpu_after = cpu::used();
        }
        if now >= drained_at {
            stage.send_replace(Stage::Over);
        }
        let next = [window, until, drained_at].into_iter().find(|at| *at > now);
        tokio::select! {
            message = messages.recv() => match message {
                Some(Message::Second { number, measured, open }) => {
                    tell(live, options, number, &measured, open)?;
                }
                Some(Message::Ready) => {}
                // Every thread is done.
                None => break,
            },
            _ = ctrl_c() => {
                if end.is_some() {
                    stage.send_replace(Stage::Over);
                } else {
                    let now = Instant::now();
                    end = Some(now);
                    drained_at = now + options.drain;
                    cpu_after = cpu_after.or_else(cpu::used);
                    stage.send_replace(Stage::Closing);
                }
            }
            () = tokio::time::sleep_until(next.unwrap_or(drained_at).into()), if next.is_some() => {}
        }
    }
    let _ = live.finish();

    let mut harvest = gather(threads)?;
    let resolved = resolve(&plan, &mut harvest).await;
    let measured = end.unwrap_or(until).min(until).saturating_duration_since(window);
    let cpu =
        cpu_before.zip(cpu_after).map(|(before, after): (Duration, Duration)| after.saturating_sub(before));
    let verdict =
        if options.verify { Some(verify(&plan, &harvest.ledger, &harvest.bearers).await) } else { None };
    let interrupted = end.is_some();
    let Harvest { recorder, unresolved, .. } = &harvest;
    let facts =
        Facts { options, recorder, unresolved: *unresolved, resolved, measured, cpu, interrupted, verdict };
    Ok(Report::new(facts))
}

fn tell(
    live: &mut Live,
    options: &Options,
    number: u64,
    measured: &crate::record::Measured,
    open: usize,
) -> Result<(), Error> {
    live.take(number, measured, open)
        .map_err(|source| Error::Series { path: options.series.clone().unwrap_or_default(), source })
}

/// Waits until every thread has its streams. If it is interrupted, the time of that.
async fn wait_ready(messages: &mut mpsc::UnboundedReceiver<Message>, threads: &[Thread]) -> Option<Instant> {
    let mut ready = 0;
    // A thread that has failed is never ready.
    while ready < threads.len() && !threads.iter().any(JoinHandle::is_finished) {
        tokio::select! {
            message = messages.recv() => match message {
                Some(Message::Ready) => ready += 1,
                Some(Message::Second { .. }) => {}
                None => return None,
            },
            () = tokio::time::sleep(LOOK_AFTER_THREADS) => {}
            _ = ctrl_c() => return Some(Instant::now()),
        }
    }
    None
}

type Thread = JoinHandle<io::Result<Harvest>>;

fn spawn(
    plan: &Arc<Plan>,
    mut customers: Vec<Tokens>,
    mut listeners: Vec<Tokens>,
    stage: &watch::Sender<Stage>,
    messages: mpsc::UnboundedSender<Message>,
) -> Result<Vec<Thread>, Error> {
    let threads = plan.options.threads();
    let mut handles = Vec::new();
    let (mut first_customer, mut first_buyer) = (0, 0);
    for thread in 0..threads {
        let left = threads - thread;
        let share_of = |rest: usize| rest.div_ceil(left as usize);
        let own: Vec<Tokens> = customers.drain(..share_of(customers.len())).collect();
        let listening: Vec<Tokens> = listeners.drain(..share_of(listeners.len())).collect();
        let buyers = (plan.options.buyers - first_buyer).div_ceil(left);
        let streams = plan.options.streams / threads + u32::from(thread < plan.options.streams % threads);
        let count = own.len() as u32;
        let share = Share {
            plan: Arc::clone(plan),
            thread,
            threads,
            customers: own,
            first_customer,
            buyers,
            first_buyer,
            listeners: listening,
            streams,
            stage: stage.subscribe(),
            messages: messages.clone(),
        };
        (first_customer, first_buyer) = (first_customer + count, first_buyer + buyers);
        let spawned = thread::Builder::new().name(format!("load-{thread}")).spawn(move || work(share));
        handles.push(spawned.map_err(Error::Threads)?);
    }
    Ok(handles)
}

/// What all threads have measured, put together.
fn gather(threads: Vec<Thread>) -> Result<Harvest, Error> {
    let mut sum: Option<Harvest> = None;
    for thread in threads {
        let harvest = thread.join().map_err(|_| Error::ThreadFailed)?.map_err(Error::Threads)?;
        match &mut sum {
            None => sum = Some(harvest),
            Some(sum) => sum.add(harvest),
        }
    }
    sum.ok_or(Error::ThreadFailed)
}
