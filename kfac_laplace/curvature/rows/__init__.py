"""What meets a weight: rows, the examples they belong to, and gradients made of them."""
