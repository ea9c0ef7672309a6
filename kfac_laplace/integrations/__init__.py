"""Other libraries' classes on this library's curvature; each file imports one of them."""
