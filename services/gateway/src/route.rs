//! Which service answers a path. A pure table; whether the path exists there is the service's own affair.

/// Who may be behind the gateway.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Service {
    Account,
    Product,
    Order,
    Payment,
    Purchase,
}

impl Service {
    pub(crate) const ALL: [Service; 5] =
        [Service::Account, Service::Product, Service::Order, Service::Payment, Service::Purchase];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Service::Account => "account",
            Service::Product => "product",
            Service::Order => "order",
            Service::Payment => "payment",
            Service::Purchase => "purchase",
        }
    }
}

/// Where a request goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Route {
    pub(crate) service: Service,
    /// What it is counted under.
    pub(crate) label: &'static str,
}

/// Where a path of the HTTP API goes.
pub(crate) fn http(path: &str) -> Option<Route> {
    let route = |service, label| Some(Route { service, label });
    let Some(rest) = path.strip_prefix("/api/") else {
        return if path == "/.well-known/jwks.json" {
            route(Service::Account, "/.well-known/jwks.json")
        } else {
            None
        };
    };
    let (first, has_more) = match rest.split_once('/') {
        Some((first, _)) => (first, true),
        None => (rest, false),
    };
    match (first, has_more) {
        ("purchase", false) => route(Service::Purchase, "/api/purchase"),
        ("purchase", true) if rest == "purchase/result" => route(Service::Purchase, "/api/purchase/result"),
        ("purchase", true) => route(Service::Purchase, "/api/purchase/{id}"),
        ("purchases", false) => route(Service::Purchase, "/api/purchases"),
        ("product", false) => route(Service::Product, "/api/product"),
        ("product", true) => route(Service::Product, "/api/product/{id}"),
        ("products", false) => route(Service::Product, "/api/products"),
        ("order", true) => route(Service::Order, "/api/order/{id}"),
        ("payment", true) => route(Service::Payment, "/api/payment/{id}"),
        ("account", true) => route(Service::Account, "/api/account/*"),
        _ => None,
    }
}

/// A gRPC service of the shop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct GrpcRoute {
    pub(crate) service: Service,
    /// What it is counted under.
    pub(crate) label: &'static str,
    /// Its calls are one small message each way and change nothing, so they may be made again.
    pub(crate) reads: bool,
}

/// Whether a gRPC method asks for the health of whoever is asked, and so goes nowhere.
pub(crate) fn asks_for_health(path: &str) -> bool {
    path.starts_with("/grpc.health.v1.Health/")
}

/// Where a gRPC method goes.
pub(crate) fn grpc(path: &str) -> Option<GrpcRoute> {
    let route = |service, label, reads| Some(GrpcRoute { service, label, reads });
    let (name, _method) = path.strip_prefix('/')?.split_once('/')?;
    match name {
        "auth.AuthService" => route(Service::Account, "/auth.AuthService/*", true),
        "product.ProductService" => route(Service::Product, "/product.ProductService/*", true),
        _ if name.starts_with("grpc.reflection.") => route(Service::Product, "/grpc.reflection.*", false),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_path_of_the_api_has_its_service() {
        for (path, service) in [
            ("/.well-known/jwks.json", Some(Service::Account)),
            ("/api/account/auth/login", Some(Service::Account)),
            ("/api/account/info/person", Some(Service::Account)),
            ("/api/product", Some(Service::Product)),
            ("/api/product/7", Some(Service::Product)),
            ("/api/products", Some(Service::Product)),
            ("/api/order/7", Some(Service::Order)),
            ("/api/payment/7", Some(Service::Payment)),
            ("/api/purchase", Some(Service::Purchase)),
            ("/api/purchase/7", Some(Service::Purchase)),
            ("/api/purchase/result", Some(Service::Purchase)),
            ("/api/purchases", Some(Service::Purchase)),
            ("/", None),
            ("/api", None),
            ("/api/", None),
            ("/api/account", None),
            ("/api/productsx", None),
            ("/metrics", None),
            ("/api//purchase", None),
        ] {
            assert_eq!(http(path).map(|route| route.service), service, "{path}");
        }
    }

    #[test]
    fn a_grpc_method_goes_by_its_service() {
        for (path, service) in [
            ("/auth.AuthService/Auth", Some((Service::Account, true))),
            ("/product.ProductService/CheckProducts", Some((Service::Product, true))),
            ("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", Some((Service::Product, false))),
            (
                "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
                Some((Service::Product, false)),
            ),
            ("/grpc.health.v1.Health/Watch", None),
            ("/auth.AuthServiceX/Auth", None),
            ("/purchase.Secret/Do", None),
            ("/", None),
        ] {
            assert_eq!(grpc(path).map(|route| (route.service, route.reads)), service, "{path}");
        }
    }
}
