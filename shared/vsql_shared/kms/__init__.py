"""Key-encryption-key providers, one file each; they wrap and unwrap data keys."""
