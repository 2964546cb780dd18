"""Tests of schema vsql_sync as an extension (make test-extension); they copy files into the servers."""
