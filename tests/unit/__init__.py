"""Tests of pure logic: bytes and values in, bytes and values out; no server is started."""
