"""From a dense model and a request to a frozen plan; never touches a tensor's values."""
