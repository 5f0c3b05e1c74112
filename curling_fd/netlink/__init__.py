"""What is asked of the kernel's network: rtnetlink, with pyroute2's message classes as the codec."""
