"""Files on a local disk or in a bucket, and who works in a folder."""
