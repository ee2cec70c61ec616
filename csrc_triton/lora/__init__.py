"""One adapter: y = x @ w.T + scaling * dropout(x) @ a.T @ b.T and its gradients."""
