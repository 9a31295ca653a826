import torch
from transformers.utils import logging

# More threads than free cores make tiny models a hundred times slower (OpenMP barriers spin), and xdist runs several.
torch.set_num_threads(1)
logging.set_verbosity_error()
