//! Where the programs' memory comes from: mimalloc, asked in the way that it is made for.
//!
//! The `mimalloc` crate asks for every block through `mi_malloc_aligned`, whatever its alignment. Where a page's list of free blocks has run
//! empty and the size is no power of two, that function does not collect what was freed in the page meanwhile, as `mi_malloc` does: it
//! takes a block large enough to be aligned within, often of another size's page. Blocks whose alignment every block has anyway, that is
//! nearly all, are asked for through `mi_malloc` here.

#![allow(
    unsafe_code,
    reason = "an allocator is an unsafe trait over C functions; nothing else in the workspace is"
)]

use std::alloc::{GlobalAlloc, Layout};
use std::ffi::c_void;

use libmimalloc_sys::{
    mi_free, mi_malloc, mi_malloc_aligned, mi_realloc, mi_realloc_aligned, mi_zalloc, mi_zalloc_aligned,
};

/// What every block of mimalloc is aligned to that is not smaller, in bytes: its `MI_MAX_ALIGN_SIZE`.
const EVERY_BLOCK: usize = 16;

/// mimalloc as a program's global allocator.
#[derive(Clone, Copy, Debug)]
pub struct Allocator;

/// Whether a block of this size has this alignment without being asked for it. One of fewer than [`EVERY_BLOCK`] bytes is aligned
/// to the largest power of two that is not larger than it.
fn is_natural(size: usize, align: usize) -> bool {
    align <= EVERY_BLOCK && align <= size
}

// SAFETY: the functions are those of an allocator. A block is at least as large and as much aligned as its layout says, by `is_natural`
// or because they are told so; whichever of them gave it, `mi_free` and `mi_realloc` take it. None of them unwinds, and null means that
// there is no memory, as the trait wants it.
unsafe impl GlobalAlloc for Allocator {
    #[inline]
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let (size, align) = (layout.size(), layout.align());
        // SAFETY: an alignment of a layout is a power of two.
        unsafe { if is_natural(size, align) { mi_malloc(size) } else { mi_malloc_aligned(size, align) } }
            .cast()
    }

    #[inline]
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        let (size, align) = (layout.size(), layout.align());
        // SAFETY: as in `alloc`.
        unsafe { if is_natural(size, align) { mi_zalloc(size) } else { mi_zalloc_aligned(size, align) } }
            .cast()
    }

    #[inline]
    unsafe fn dealloc(&self, block: *mut u8, _: Layout) {
        // SAFETY: the caller has it from here, and gives it back once.
        unsafe { mi_free(block.cast::<c_void>()) }
    }

    #[inline]
    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        let (block, align) = (block.cast::<c_void>(), layout.align());
        // SAFETY: the caller has it from here, and no longer uses it unless null is returned.
        unsafe {
            if is_natural(size, align) {
                mi_realloc(block, size)
            } else {
                mi_realloc_aligned(block, size, align)
            }
        }
        .cast()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[global_allocator]
    static ALLOCATOR: Allocator = Allocator;

    /// Every size and alignment that a program may ask for in earnest, several of each at once, so that not only the first block of a page
    /// is looked at; grown and shrunk, too.
    #[test]
    fn blocks_are_aligned_and_keep_their_bytes() {
        let sizes = (1..300).chain([500, 1_000, 1_024, 1_025, 4_000, 70_000, 3 << 20]);
        for size in sizes {
            for align in (0..=12).map(|power| 1_usize << power) {
                let layout = Layout::from_size_align(size, align).unwrap();
                let blocks: Vec<*mut u8> = (0..5_u8).map(|mark| grown(layout, mark)).collect();
                for (mark, block) in (0..5_u8).zip(blocks) {
                    let larger = Layout::from_size_align(2 * size, align).unwrap();
                    // SAFETY: `grown` allocated it with this layout and filled it.
                    unsafe {
                        let bytes = std::slice::from_raw_parts(block, 2 * size);
                        assert!(bytes.iter().all(|byte| *byte == mark), "{size} bytes, aligned to {align}");
                        let smaller = ALLOCATOR.realloc(block, larger, size);
                        assert!(smaller.addr().is_multiple_of(align), "{size} bytes, aligned to {align}");
                        assert_eq!(*smaller.add(size - 1), mark);
                        ALLOCATOR.dealloc(smaller, layout);
                    }
                }
            }
        }
    }

    /// A block of this layout, looked at, then twice as large and full of `mark`.
    fn grown(layout: Layout, mark: u8) -> *mut u8 {
        let (size, align) = (layout.size(), layout.align());
        // SAFETY: no size is 0, each block is used within its size and freed once, with its layout.
        unsafe {
            let zeroed = ALLOCATOR.alloc_zeroed(layout);
            assert!(zeroed.addr().is_multiple_of(align), "{size} bytes, aligned to {align}");
            assert!(std::slice::from_raw_parts(zeroed, size).iter().all(|byte| *byte == 0));
            zeroed.write_bytes(mark, size);
            ALLOCATOR.dealloc(zeroed, layout);

            let block = ALLOCATOR.alloc(layout);
            assert!(block.addr().is_multiple_of(align), "{size} bytes, aligned to {align}");
            block.write_bytes(mark, size);
            let block = ALLOCATOR.realloc(block, layout, 2 * size);
            assert!(block.addr().is_multiple_of(align), "{size} bytes, aligned to {align}");
            block.add(size).write_bytes(mark, size);
            block
        }
    }
}
