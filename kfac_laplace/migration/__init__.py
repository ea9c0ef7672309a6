"""laplace-torch's words for what a posterior does; every one leads to a word of this library's."""
