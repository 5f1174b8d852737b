//! What a lone replica asks of other services, and the gateway's way to them.

use std::net::SocketAddr;

use gateway::{Gateway, HEAD_TIMEOUT, Upstreams};
use peers::{Addresses, Peers};
use serve::auth::{KeySet, Realm, Verifier};
use shop::calls::{CheckProducts, GetProducts};

use super::engines::Progress;
use super::services::Common;
use crate::config::servers::Service;

/// Where a service's replicas are. The settings name some, or the process would not have started.
fn places(common: &Common<'_>, service: Service) -> Addresses {
    common.config.peers.of(service).cloned().unwrap_or_else(|| Vec::<SocketAddr>::new().into())
}

/// A service's replicas, watched as long as the process runs.
fn peers_of<L: Send + Sync + 'static>(
    common: &Common<'_>,
    service: Service,
    link: impl Fn(SocketAddr) -> L + Send + Sync + 'static,
) -> Peers<L> {
    let peers = Peers::new(service.name(), places(common, service), link);
    common.workers.spawn("replicas of others", peers.clone().run(common.workers.stop.clone()));
    peers
}

/// No replica of the account service has told its keys yet.
#[derive(Debug, thiserror::Error)]
#[error("no public key yet: no replica of the account service has answered")]
struct NoKeys;

/// Verifies access tokens with the public keys that the account service's replicas publish. Waits for the first: until then every
/// token would be taken for invalid.
pub(super) async fn verifier(common: &Common<'_>, progress: &Progress) -> Verifier {
    let verifier = Verifier::new(&KeySet::default(), &Realm::default(), common.clock.clone());
    let account = peers_of(common, Service::Account, |_| ());
    let follow = serve::keys::follow(verifier.clone(), account, common.workers.stop.clone());
    common.workers.spawn("public keys", follow);
    let there = async || if verifier.has_keys() { Ok(()) } else { Err(NoKeys) };
    // It waits for as long as it takes: nothing about it is final.
    let _ = progress.wait_for(there, |_| true).await;
    verifier
}

/// Asks the product service which products exist.
pub(super) fn check_products(common: &Common<'_>) -> CheckProducts {
    rpc::check_products(peers_of(common, Service::Product, rpc::channel))
}

/// Asks the product service what is known of products.
pub(super) fn get_products(common: &Common<'_>) -> GetProducts {
    rpc::get_products(peers_of(common, Service::Product, rpc::channel))
}

/// Starts the gateway.
pub(super) fn gateway(common: &Common<'_>) -> Gateway {
    let gateway = gateway::start(gateway::Parts {
        upstreams: Upstreams {
            account: places(common, Service::Account),
            product: places(common, Service::Product),
            order: places(common, Service::Order),
            payment: places(common, Service::Payment),
            purchase: places(common, Service::Purchase),
        },
        head_timeout: HEAD_TIMEOUT,
        registry: common.registry.clone(),
        spans: common.spans(Service::Gateway),
        stop_streams: common.doors.stop.clone(),
    });
    common.workers.spawn("gateway", gateway.clone().run(common.workers.stop.clone()));
    gateway
}
