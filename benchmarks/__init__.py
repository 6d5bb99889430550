"""What is measured: run the files as scripts; tests import parts of them."""
