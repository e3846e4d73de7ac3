"""One page from what runs keep: metrics, evaluations, studies."""
