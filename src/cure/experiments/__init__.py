"""Many runs: plans, sweeps, comparison."""
