"""The lab's cluster controllers: pure plans over what the store holds, and a small driver that performs them."""
