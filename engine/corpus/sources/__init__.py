"""Sources of text, cut into chunks of raw documents: files, compression, Parquet, Hugging Face datasets."""
