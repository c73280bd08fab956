"""Numbers that say how good something is."""



def compute_recall(queries, targets, ks):
    """{"recall@k": share of queries (N, D) whose own target, the same row of `targets` (N, D), is
    among the k nearest by dot product}; equal scores count against the query."""
    scores = queries @ targets.T  # (N, N)
    own = scores.diagonal()[:, None]
    better = (scores >= own).sum(1) - 1  # others that score as high
    return {f"recall@{k}": (better < k).float().mean().item() for k in ks}
