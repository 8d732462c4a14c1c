"""A store that several machines share: revisions, and what names mean, in a bucket of an S3-compatible store."""
