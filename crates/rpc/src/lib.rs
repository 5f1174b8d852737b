//! gRPC between services: messages, balanced channels, health and reflection.
