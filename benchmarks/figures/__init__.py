"""What happens to figures: the kernels are proved first, then measured, saved, compared, and shown."""
