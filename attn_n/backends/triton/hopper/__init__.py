"""What Hopper (sm_90) has of its own: kernels in Gluon, by its copy engine and its asynchronous products."""
