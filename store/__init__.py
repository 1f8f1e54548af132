"""Where evidence lives: HDF5 activation shards, Parquet evidence and the DuckDB feature store. Imports no torch."""
