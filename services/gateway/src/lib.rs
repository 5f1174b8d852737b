//! One port before all replicas of all services.
