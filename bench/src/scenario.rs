//! The scenarios by their names.

use crate::Error;
use crate::bench::Bench;
use crate::record::Findings;
use crate::{endurance, parts, rates, servers};

/// What can be measured. The order is the one in which it is run and shown: later ones go by the peak of `purchase`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scenario {
    Purchase,
    Witness,
    Hot,
    Lone,
    Fifth,
    Product,
    Catalogue,
    Parts,
    Steady,
    Million,
    Overload,
    Streams,
    Crash,
    Servers,
    ServersLone,
    Broker,
}

impl Scenario {
    pub(crate) const ALL: [Scenario; 16] = [
        Scenario::Purchase,
        Scenario::Witness,
        Scenario::Hot,
        Scenario::Lone,
        Scenario::Fifth,
        Scenario::Product,
        Scenario::Catalogue,
        Scenario::Parts,
        Scenario::Steady,
        Scenario::Million,
        Scenario::Overload,
        Scenario::Streams,
        Scenario::Crash,
        Scenario::Servers,
        Scenario::ServersLone,
        Scenario::Broker,
    ];

    /// How it is called on the command line, and its record.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Scenario::Purchase => "purchase",
            Scenario::Witness => "witness",
            Scenario::Hot => "hot",
            Scenario::Lone => "lone",
            Scenario::Fifth => "fifth",
            Scenario::Product => "product",
            Scenario::Catalogue => "catalogue",
            Scenario::Parts => "parts",
            Scenario::Steady => "steady",
            Scenario::Million => "million",
            Scenario::Overload => "overload",
            Scenario::Streams => "streams",
            Scenario::Crash => "crash",
            Scenario::Servers => "servers",
            Scenario::ServersLone => "servers-lone",
            Scenario::Broker => "broker",
        }
    }

    /// Its heading.
    pub(crate) fn title(self) -> &'static str {
        match self {
            Scenario::Purchase => "Purchases at the peak",
            Scenario::Witness => "The witness from outside: wrk",
            Scenario::Hot => "Everybody wants the same product",
            Scenario::Lone => "One lone purchase at an idle shop",
            Scenario::Fifth => "At a fifth of the peak",
            Scenario::Product => "Reading a product",
            Scenario::Catalogue => "Reading the catalogue",
            Scenario::Parts => "The parts alone",
            Scenario::Steady => "Long and steady, at half the peak",
            Scenario::Million => "A large database",
            Scenario::Overload => "Three times too much",
            Scenario::Streams => "Many who listen",
            Scenario::Crash => "Killed at full rate",
            Scenario::Servers => "On servers: purchases at the peak",
            Scenario::ServersLone => "On servers: one lone purchase",
            Scenario::Broker => "On servers: the whole broker lost at the peak",
        }
    }

    /// Whether it takes so long that it is run only when it is asked for.
    pub(crate) fn is_long(self) -> bool {
        match self {
            Scenario::Purchase
            | Scenario::Witness
            | Scenario::Hot
            | Scenario::Lone
            | Scenario::Fifth
            | Scenario::Product
            | Scenario::Catalogue
            | Scenario::Parts => false,
            Scenario::Steady
            | Scenario::Million
            | Scenario::Overload
            | Scenario::Streams
            | Scenario::Crash
            | Scenario::Servers
            | Scenario::ServersLone
            | Scenario::Broker => true,
        }
    }

    /// Measures.
    ///
    /// # Errors
    /// What kept it from doing so. That a figure is not what was asked is none.
    pub(crate) async fn run(self, bench: &Bench) -> Result<Findings, Error> {
        match self {
            Scenario::Purchase => rates::purchase(bench).await,
            Scenario::Witness => rates::witness(bench).await,
            Scenario::Hot => rates::hot(bench).await,
            Scenario::Lone => endurance::lone(bench).await,
            Scenario::Fifth => endurance::fifth(bench).await,
            Scenario::Product => rates::product(bench).await,
            Scenario::Catalogue => rates::catalogue(bench).await,
            Scenario::Parts => parts::parts(bench).await,
            Scenario::Steady => endurance::steady(bench).await,
            Scenario::Million => endurance::million(bench).await,
            Scenario::Overload => endurance::overload(bench).await,
            Scenario::Streams => endurance::streams(bench).await,
            Scenario::Crash => endurance::crash(bench).await,
            Scenario::Servers => servers::servers(bench).await,
            Scenario::ServersLone => servers::lone(bench).await,
            Scenario::Broker => servers::broker(bench).await,
        }
    }
}
