"""What a user may say: flags and YAML."""
