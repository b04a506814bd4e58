"""Where it lands: providers, ledger, shaping, store, Kafka, ClickHouse."""
