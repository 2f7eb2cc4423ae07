"""A sweep's jobs elsewhere: on a Slurm cluster, or on rented machines."""
