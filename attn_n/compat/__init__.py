"""The functions of other libraries under their own names and signatures, with n: one changed import."""
