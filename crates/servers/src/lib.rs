//! MariaDB, NATS and Redis as child processes, for tests and measurements.
