"""What each `icrl` command does and prints; `icrl.cli` has their options."""
