"""The equipment of rlhf_colocate.py: nothing in here imports the script."""
