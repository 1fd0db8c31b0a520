//! The numbers that SDXL is told beside the text: how large a training picture was, where it was cut, how large the result is, or how
//! beautiful (Podell et al., "SDXL", arXiv 2307.01952, section 2.2).

/// What a user says of them; the picture's own size, no cut and the usual scores where absent.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct SizeConditioning {
    /// Width and height that the picture seems to have had before it was scaled.
    pub original: Option<(usize, usize)>,
    /// Pixels that seem to be cut off at the left and at the top.
    pub crop: Option<(usize, usize)>,
    /// Width and height that the result seems to have.
    pub target: Option<(usize, usize)>,
    /// The refiner's score of beauty, 0 to 10.
    pub aesthetic_score: Option<f64>,
}

/// The refiner's scores for prompt and negative prompt, as in diffusers.
const SCORES: (f64, f64) = (6.0, 2.5);

/// The numbers for the negative prompt and for the prompt, `count` each: six are sizes, five end in a score.
pub(super) fn numbers(
    count: usize,
    size: (usize, usize),
    (negative, positive): (SizeConditioning, SizeConditioning),
) -> [Vec<f64>; 2] {
    // with a score, diffusers does not take over the crop
    let crop = positive.crop.filter(|_| count != 5);
    let merged = SizeConditioning {
        original: negative.original.or(positive.original),
        crop: negative.crop.or(crop),
        target: negative.target.or(positive.target),
        aesthetic_score: negative.aesthetic_score.or(Some(SCORES.1)),
    };
    [merged, positive].map(|sizes| {
        let (width, height) = sizes.original.unwrap_or(size);
        let (left, top) = sizes.crop.unwrap_or((0, 0));
        let mut numbers = vec![height as f64, width as f64, top as f64, left as f64];
        if count == numbers.len() + 1 {
            numbers.push(sizes.aesthetic_score.unwrap_or(SCORES.0));
        } else {
            let (width, height) = sizes.target.unwrap_or(size);
            numbers.extend([height as f64, width as f64]);
        }
        numbers.truncate(count);
        numbers
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heights_come_first_and_negatives_follow() {
        let sizes = SizeConditioning {
            original: Some((640, 480)),
            crop: Some((3, 5)),
            ..SizeConditioning::default()
        };
        let negative = SizeConditioning {
            target: Some((8, 16)),
            ..SizeConditioning::default()
        };
        let [without, with] = numbers(6, (512, 768), (negative, sizes));
        assert_eq!(with, [480.0, 640.0, 5.0, 3.0, 768.0, 512.0]);
        assert_eq!(without, [480.0, 640.0, 5.0, 3.0, 16.0, 8.0]);
        let [without, with] = numbers(5, (512, 768), Default::default());
        assert_eq!(with, [768.0, 512.0, 0.0, 0.0, 6.0]);
        assert_eq!(without.last(), Some(&2.5));
        assert_eq!(numbers(0, (8, 8), Default::default())[0], [0.0; 0]);
    }
}
