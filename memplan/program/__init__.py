"""The contract: what a Plan says, how it is written, replayed and checked."""
