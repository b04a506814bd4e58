"""What every part costs: benchmarks, side by side in one run."""
