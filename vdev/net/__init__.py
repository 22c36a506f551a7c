"""What a virtio network device is: features, and the offer made from them."""
