"""Text in its many places to chunks of raw documents: files, compression, Parquet, Hugging Face datasets."""
