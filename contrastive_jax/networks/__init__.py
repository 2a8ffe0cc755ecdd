"""Networks that methods train, and what they remember between steps."""
