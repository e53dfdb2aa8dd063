"""Selection of documents: exact and near duplicates, languages and quality, the same for any number of workers."""
